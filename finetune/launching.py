"""`finetune train --launch X`: check first, start `accelerate launch`, end with the trainer's own status and message."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune import launch, recipe
from finetune.errors import FinetuneError
from finetune.exits import STATUS_FILE
from finetune.windows import plan_batch


class LaunchedRunFailed(FinetuneError):
    """The launched trainer ended with a status of its own; the message is its last."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.exit_code = code


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_train(recipe_path: str, overrides: Sequence[str], launch_file: str | None) -> None:
    """Check recipe and launch file, then launch the trainer and wait. Raises FinetuneError with its status."""
    loaded = recipe.load(recipe_path, overrides)
    strategy = launch.read(launch_file) if launch_file else launch.one_process()
    plan_batch(loaded, strategy)
    trainer = str(Path(__file__).resolve().parent / "train.py")
    if launch_file is None:
        command = [sys.executable, trainer, recipe_path, *overrides]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch_file]
        if strategy.ranks > 1 and strategy.machines == 1:
            command += ["--main_process_port", str(free_port())]  # 29500, the default, is everybody's
        command += [trainer, recipe_path, *overrides]
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        status_file = Path(folder) / "status.json"
        environment = dict(os.environ) | {STATUS_FILE: str(status_file)}
        environment["FINETUNE_REQUESTED_PROCESSES"] = str(strategy.ranks)
        code = subprocess.run(command, env=environment).returncode
        status = json.loads(status_file.read_text()) if status_file.exists() else None
    if status is not None and status["exit_code"]:
        raise LaunchedRunFailed(status["exit_code"], status["message"])
    if code:
        raise LaunchedRunFailed(code if code > 0 else 128 - code, f"the trainer ended with status {code} and no message")
