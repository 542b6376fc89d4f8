"""The trainer, whose address space ends a few MiB above what it holds when a window begins. Arguments: window recipe
overrides.
"""

from __future__ import annotations

import resource
import sys

import psutil

from finetune.commands.train import run_rank
from finetune.training import step

ROOM_BYTES = 4 * 2**20
seed = step.seed_randomness


def seed_and_tighten(number: int, window: int, micro_batch: int, rank: int) -> None:
    if window + 1 == int(sys.argv[1]):
        limit = psutil.Process().memory_info().vms + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seed(number, window, micro_batch, rank)


step.seed_randomness = seed_and_tighten
run_rank(sys.argv[2:])
