"""A batch that grows over the run gives the same losses on one rank, two DDP ranks and two ranks of ZeRO-3 with
offload.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked import train
from tests.support.launch import launch_file
from tests.support.tiny_models import small_recipe

TOLERANCE = 1e-5  # nats per token
LAUNCHES = {
    "one rank": dict(ranks=1),
    "DDP": dict(ranks=2),
    "ZeRO-3 with offload": dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
}
# 40 rows of training data, 8 rows per step at the end: 1, 3, then 8 rows, so that ranks are empty, unequal and full
OVERRIDES = (
    "accumulation={schedule: warmup, warmup: [[0.1, 0.1], [0.4, 0.4], [1.0, 1.0]]}",
    "training.adam_epsilon=1e-6",
    "training.lr_scaling=sqrt",
    "training.reference_batch_size=8",
)


def steps(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.slow
def test_the_same_losses_on_any_launch(tmp_path):
    recipe = small_recipe(tmp_path / "job")
    found = {}
    for name, options in LAUNCHES.items():
        file, output = launch_file(tmp_path / "launch.yaml", **options), tmp_path / name.replace(" ", "_")
        done = train(file, recipe, *OVERRIDES, f"output_dir={output}", env={"FINETUNE_CACHE": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = steps(output)
    plain = found.pop("one rank")
    assert [row["rows"] for row in plain] == [1] * 4 + [3] * 4 + [8] * 3
    assert [row["gradient_accumulation_steps"] for row in plain] == [1] * 4 + [2] * 4 + [4] * 3
    assert len({row["learning_rate"] for row in plain}) > 8
    for name, other in found.items():
        assert [row["gradient_accumulation_steps"] for row in other] == [1] * 8 + [2] * 3, name
        for key in ("rows", "learning_rate", "tokens", "epoch"):
            assert [row[key] for row in other] == [row[key] for row in plain], (name, key)
        worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, other, strict=True))
        assert worst <= TOLERANCE, (name, [row["loss"] for row in plain], [row["loss"] for row in other])
