"""Run under a launcher: the trainer, whose learning rate is 300 times too high from a step on. Arguments: step recipe
overrides.
"""

from __future__ import annotations

import sys

from finetune.batching.learning_rate import Schedule
from finetune.commands.train import run_rank

learning_rate = Schedule.learning_rate


def too_high(self, step: int, applied_rows: int, doublings: int) -> float:
    return learning_rate(self, step, applied_rows, doublings) * (300 if step >= int(sys.argv[1]) else 1)


Schedule.learning_rate = too_high
run_rank(sys.argv[2:])
