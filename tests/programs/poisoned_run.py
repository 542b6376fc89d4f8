"""Run under a launcher: the trainer, whose last rank's loss is NaN in some windows. Arguments: windows (2,5) recipe
overrides.
"""

from __future__ import annotations

import os
import sys

from finetune.commands.train import run_rank
from finetune.objectives.sft import SummedLoss
from finetune.training import step

POISONED = {int(number) for number in sys.argv[1].split(",")}
seed, forward = step.seed_randomness, SummedLoss.forward
now = [-1]


def seed_and_remember(number: int, window: int, micro_batch: int, rank: int) -> None:
    now[0] = window
    seed(number, window, micro_batch, rank)


def forward_to_nan(self, batch):
    loss = forward(self, batch)
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    return loss * float("nan") if self.training and last and now[0] in POISONED else loss


step.seed_randomness, SummedLoss.forward = seed_and_remember, forward_to_nan
run_rank(sys.argv[2:])
