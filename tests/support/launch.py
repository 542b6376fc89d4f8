"""Real launches for tests: launch files on the spot, a free port, a time limit, output kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from finetune.launch.start import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "finetune" / "train.py"
CONFIGS = ROOT / "accelerate_configs"


def launch_file(
    path: Path,
    ranks: int,
    zero_stage: int = 0,
    offload_optimizer: str = "none",
    offload_param: str = "none",
    precision: str = "no",
    use_cpu: bool = True,
    **deepspeed,
) -> Path:
    """A launch file, for the CPU unless said otherwise: DDP (or one process) without a ZeRO stage."""
    kind = "DEEPSPEED" if zero_stage else "MULTI_GPU" if ranks > 1 else "NO"
    document = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "use_cpu": use_cpu,
        "num_machines": 1,
        "num_processes": ranks,
        "mixed_precision": precision,
    }
    if zero_stage:
        document["deepspeed_config"] = {
            "zero_stage": zero_stage,
            "offload_optimizer_device": offload_optimizer,
            "offload_param_device": offload_param,
            **deepspeed,
        }
    path.write_text(yaml.safe_dump(document))
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launched test: one thread per rank, nothing inherited from an outer launch."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "FINETUNE_REQUESTED")) and k != "LOCAL_RANK"
    }
    return kept | {"OMP_NUM_THREADS": "1", "FINETUNE_CPU_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def program(name: str) -> tuple[str, str]:
    """tests/programs/NAME.py as the words that start it: after the interpreter, or after `accelerate launch`."""
    return "-m", f"tests.programs.{name}"


def run(command: Sequence[str | Path], cwd: Path | None = None, env: dict | None = None, timeout: float = 600):
    """Run a command to its end; CompletedProcess with text in stdout and stderr. Fails the test after `timeout`
    seconds.
    """
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment(**(env or {})),
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def accelerate(config_file: Path, *arguments: str | Path, **options):
    """`accelerate launch --config_file config_file arguments...` with a free port."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config_file,
        "--main_process_port",
        str(free_port()),
        *arguments,
    ]
    return run(command, **options)


def train(config_file: Path, recipe: Path, *overrides: str, **options):
    """The real trainer under `accelerate launch`."""
    return accelerate(config_file, TRAIN, recipe, *overrides, **options)
