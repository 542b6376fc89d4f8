"""The trainer on ranks whose devices differ: rank 0 has 1 MiB for its step, the others 2 MiB. Arguments: recipe
overrides.
"""

from __future__ import annotations

import os
import sys

from finetune.commands.train import run_rank
from finetune.memory import micro_batch

micro_batch.budget_bytes = lambda settled: (2**20 if os.environ["RANK"] == "0" else 2**21, "this device")
run_rank(sys.argv[1:])
