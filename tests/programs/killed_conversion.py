"""Run under a launcher: the trainer, killed by SIGKILL when the conversion of DeepSpeed's shards is nearly done.
Arguments: recipe overrides.
"""

from __future__ import annotations

import os
import signal
import sys

from deepspeed.checkpoint import ds_to_universal

from finetune.commands.train import run_rank

ds_to_universal._save_optimizer_state = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
run_rank(sys.argv[1:])
