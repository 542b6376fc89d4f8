"""What launched this process, read off the command lines of its parents. Torch-free."""

from __future__ import annotations

import os

import psutil

from finetune.launch import default_config_file, is_launcher, requested

GENERATIONS = 4  # launcher -> agent -> shell -> rank is the longest chain seen


def launched_by() -> tuple[int | None, str | None]:
    """(ranks asked for, launch file), each None when nobody said.

    accelerate starts one process for `--cpu --num_processes 2` without a word; only its own command line knows.
    """
    process = psutil.Process()
    for _ in range(GENERATIONS):
        try:
            process = process.parent()
            argv = process.cmdline() if process is not None else []
            folder = process.cwd() if argv else "."
        except psutil.Error:
            break
        if not argv:
            break
        if is_launcher(argv):
            ranks, config_file = requested(argv, os.environ)
            if config_file is not None and not os.path.isabs(config_file):
                config_file = os.path.join(folder, config_file)
            return ranks, config_file
    said = os.environ.get("FINETUNE_REQUESTED_PROCESSES", "")
    return (int(said) if said.isdigit() else None), None
