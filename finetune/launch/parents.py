"""What launched this process, read off the command lines of its parents. Torch-free."""

from __future__ import annotations

import os

import psutil

from finetune.errors import UserError
from finetune.launch.strategy import Strategy, asked

GENERATIONS = 4  # launcher -> agent -> shell -> rank is the longest chain seen
HOW_TO_START_RANKS = (
    "`accelerate launch --cpu` starts one process whatever --num_processes says. For two ranks on the CPU use"
    " --config_file accelerate_configs/cpu_2_ranks.yaml, or `python -m torch.distributed.run --nproc_per_node 2`; for"
    " GPUs accelerate_configs/multi_gpu.yaml."
)


def launched_by() -> tuple[int | None, str | None]:
    """(ranks asked for, launch file), each None when nobody said: from the nearest parent that is a launcher.

    accelerate starts one process for `--cpu --num_processes 2` without a word; only its own command line knows.
    """
    parents, process = [], psutil.Process()
    for _ in range(GENERATIONS):
        try:
            process = process.parent()
            if process is None:
                break
            parents.append((process.cmdline(), process.cwd()))
        except psutil.Error:
            break
    return asked(parents, os.environ)


def check_ranks_asked_for(strategy: Strategy, ranks_asked: int | None) -> None:
    """Raises UserError when the launcher started another number of ranks than it was asked for."""
    if ranks_asked not in (None, strategy.ranks):
        found = "one process was" if strategy.ranks == 1 else f"{strategy.ranks} processes were"
        raise UserError(f"launch: {ranks_asked} processes were asked for, but {found} started. {HOW_TO_START_RANKS}")
