"""`run`, `accelerate` and `train` of launch.py without the imports: ranks are forked from a process that has them.

A launch imports torch, transformers, accelerate, DeepSpeed and peft once per rank and once more in its launcher, some
8 CPU seconds each; most tests are about what a run does, and not about how it was started. Here the processes, their
environment, their signals and their exit statuses are real, and only the imports are shared: see
tests/programs/forking_launcher.py. tests/training/test_forked.py compares a run started both ways. Tests of launchers,
of messages at a launch's end and of what is imported use launch.py.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.launch.start import free_port
from tests.support.launch import ROOT, TRAIN, environment, program

PADDING = "-" * 8192
IMPORT_SECONDS = 300


@dataclass(frozen=True)
class Ended:
    """As subprocess.CompletedProcess, with each rank's own status: the launcher ends with 1 whatever its ranks' is."""

    returncode: int
    stdout: str
    stderr: str
    statuses: tuple[int, ...]


@functools.cache
def _server(test_process: int) -> str:
    """The socket of the process that forks: started when it is first needed, it ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="finetune-forked-")
    path = os.path.join(folder.name, "socket")
    command = [sys.executable, *program("forking_launcher"), path, PADDING]
    env = environment(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    with open(os.path.join(folder.name, "log"), "w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, cwd=ROOT)

    def end() -> None:
        process.stdin.close()
        process.wait(60)
        folder.cleanup()

    atexit.register(end)
    deadline = time.monotonic() + IMPORT_SECONDS
    while not os.path.exists(path):
        assert process.poll() is None, Path(folder.name, "log").read_text()
        assert time.monotonic() < deadline, "the forking launcher does not answer"
        time.sleep(0.05)
    return path


def run(
    command: Sequence[str | Path],
    cwd: Path | None = None,
    env: dict | None = None,
    timeout: float = 600,
    launcher: bool = False,
) -> Ended:
    """Run `sys.executable ...` to its end. Fails the test after `timeout` seconds."""
    words = [str(word) for word in command]
    assert words[0] == sys.executable
    path = _server(os.getpid())
    with tempfile.TemporaryDirectory(prefix="finetune-forked-") as scratch, socket.socket(socket.AF_UNIX) as connection:
        stdout, stderr = Path(scratch, "stdout"), Path(scratch, "stderr")
        request = {"command": words, "launcher": launcher, "environ": environment(**(env or {})), "scratch": scratch}
        request |= {"folder": str(cwd or Path.cwd()), "stdout": str(stdout), "stderr": str(stderr)}
        connection.settimeout(timeout)
        connection.connect(path)
        answers = connection.makefile()
        pid = int(answers.readline())
        connection.sendall(json.dumps(request).encode() + b"\n")
        try:
            answer = answers.readline()
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout, stdout.read_bytes(), stderr.read_bytes()) from None
        said, warned = (file.read_text() if file.exists() else "" for file in (stdout, stderr))
    assert answer, f"the launch ended without an answer: {warned[-3000:]}"
    statuses = tuple(json.loads(answer))
    code = int(any(statuses)) if launcher else statuses[0]
    return Ended(code, said, warned, statuses)


def accelerate(config_file: Path, *arguments: str | Path, **options) -> Ended:
    """`accelerate launch --config_file config_file arguments...` with a free port."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    return run([*start, "--main_process_port", free_port(), *arguments], launcher=True, **options)


def train(config_file: Path, recipe: Path, *overrides: str, **options) -> Ended:
    """The real trainer under `accelerate launch`."""
    return accelerate(config_file, TRAIN, recipe, *overrides, **options)
