"""Neighbours of the compatibility table's refusals, run for real on two CPU ranks: they learn as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked import train
from tests.support.launch import launch_file
from tests.support.tiny_models import small_recipe

CASES = {  # name: (overrides, launch file)
    "8-bit AdamW, ZeRO-3": (["training.optim=adamw_8bit"], dict(zero_stage=3)),
    "QLoRA, ZeRO-2 with optimizer offload": (
        ["lora.r=4", "model.load_in_4bit=true"],
        dict(zero_stage=2, offload_optimizer="cpu"),
    ),
    "SGD, ZeRO-3 with offload": (
        ["training.optim=sgd"],
        dict(zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
    ),
}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_the_table_lets_through_trains_like_one_process(name, tmp_path):
    overrides, launch = CASES[name]
    recipe = small_recipe(tmp_path / "job", family="qwen3")
    found = []
    for run, options in (("one", dict(ranks=1)), ("two", dict(ranks=2, **launch))):
        file = launch_file(tmp_path / f"{run}.yaml", **options)
        done = train(
            file,
            recipe,
            *overrides,
            "training.max_steps=3",
            f"output_dir={tmp_path / run}",
            env={"FINETUNE_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(losses(tmp_path / run))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[0][2] < found[0][0]
