"""Run alone: the trainer, with a bug after step 2 whose message holds secrets. Arguments: recipe overrides."""

from __future__ import annotations

import os
import sys

from finetune.commands.train import run_rank
from finetune.report.run_folder import RunFiles

log = RunFiles.log


def log_and_leak(self, row: dict) -> None:
    log(self, row)
    if row["step"] == 2:
        secrets = [os.environ[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")]
        raise RuntimeError(
            f"cannot reach https://somebody:{os.environ['PLANTED']}@host/file?token={os.environ['PLANTED']} with"
            f" {secrets}"
        )


RunFiles.log = log_and_leak
run_rank(sys.argv[1:])
