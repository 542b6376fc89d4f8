"""`finetune verify` with an engine that divides by the number of micro-batches once too often. Arguments: those of
verify.
"""

from __future__ import annotations

import sys

from finetune.commands.cli import main
from finetune.engine.engine import Engine

right_step = Engine.micro_step


def forgets_k(self, batch, denominator, last):
    return right_step(self, batch, denominator * self.accelerator.gradient_accumulation_steps, last)


Engine.micro_step = forgets_k
sys.argv.insert(1, "verify")
main()
