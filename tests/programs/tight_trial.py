"""The trainer, whose address space is too small for the first trial of a micro-batch chosen by memory. Arguments:
recipe overrides.
"""

from __future__ import annotations

import resource
import sys

import psutil

from finetune.commands.train import run_rank
from finetune.training import micro_batch_trial

ROOM_BYTES = 2**20
accumulate, trials = micro_batch_trial.accumulate, []


def tighten_once(engine, batches):
    trials.append(len(batches))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = psutil.Process().memory_info().vms + ROOM_BYTES if len(trials) == 1 else hard
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        return accumulate(engine, batches)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


micro_batch_trial.accumulate = tighten_once
run_rank(sys.argv[1:])
