"""The speed benchmark runs, and all its contestants train the same thing. How fast they are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.launch import ROOT, environment


@pytest.mark.slow
def test_all_contestants_train_the_same_rows_to_the_same_loss():
    command = [sys.executable, "-m", "scripts.benchmark", "--small", "--steps", "1", "--precisions", "no"]
    done = subprocess.run(
        [*command, "--threads", "1"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads(done.stdout)["no"]
    assert set(table) >= {"ours", "ours, packing off", "padded by hand", "packed by hand", "HF Trainer"}
    losses = [row["held_out_loss"] for row in table.values()]
    # three steps of AdamW with epsilon 1e-6: rounding, and torch's own norm for clipping (engine/clipping.py)
    assert max(losses) - min(losses) < 1e-5 * max(losses)
    assert all(row["tokens_per_second"] > 0 and row["training_bytes"] > 0 for row in table.values())
