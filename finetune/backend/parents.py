"""What launched this process, read off the command lines of its parents. Torch-free."""

from __future__ import annotations

import os

import psutil

from finetune.launch import asked

GENERATIONS = 4  # launcher -> agent -> shell -> rank is the longest chain seen


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
