"""An adaptive batch under real engines: what is measured is the gradient noise, and every rank follows the same
batch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.batching.layout import split_into_micro_batches
from finetune.batching.noise_scale import NoiseMeasurement, measure
from finetune.batching.windows import Position, next_window
from finetune.data.collate import padded
from finetune.launch.strategy import one_process
from finetune.model.load import load_model
from finetune.objectives.sft import sft_loss
from finetune.recipe.load import load_recipe
from finetune.training.job import prepare
from tests.support.forked import train
from tests.support.launch import launch_file
from tests.support.tiny_models import small_recipe

LAUNCHES = {
    "DDP": dict(ranks=2),
    "ZeRO-2": dict(ranks=2, zero_stage=2),
    "ZeRO-3 with offload": dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
}
OVERRIDES = (
    "accumulation={schedule: adaptive, smallest: 0.5, largest: 2, measure_every: 1}",
    "training.max_steps=9",
    "data.packing=false",
    "training.adam_epsilon=1e-6",
    "training.lr_scaling=sqrt",
    "training.reference_batch_size=8",
)
# Relative. The noise is the difference of two sums that are equal to a tenth or so: float32's 1e-7 in each gradient,
# some tens of times over; and the weights of later steps differ by as much.
TOLERANCE = 1e-4


def steps(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def first_window(recipe_path: Path, ranks: int) -> NoiseMeasurement:
    """The first window's measurement in plain torch: every micro-batch's gradient by itself."""
    loaded = load_recipe(recipe_path, OVERRIDES)
    plan = prepare(loaded, one_process(), lambda line: None)
    network = load_model(loaded, one_process(), plan.facts, torch.device("cpu"))
    window = next_window(Position(), len(plan.data.train), 8, loaded.recipe.training.seed)
    total, squares, tokens, count = None, 0.0, 0, 0
    for micro_batch in (part for share in split_into_micro_batches(window.rows, ranks, 2) for part in share):
        batch = padded([plan.data.train.row(i) for i in micro_batch], 0)
        network.zero_grad()
        sft_loss(network, **batch.inputs).backward()
        gradient = torch.cat([p.grad.double().flatten() for p in network.parameters()])
        squares += float(gradient @ gradient) / batch.trained_tokens
        tokens, count = tokens + batch.trained_tokens, count + 1
        total = gradient if total is None else total + gradient
    return measure(squares, count, tokens, len(window.rows), float(total.norm()) / tokens)


@pytest.mark.slow
def test_the_noise_is_measured_and_followed_alike_under_every_engine(tmp_path):
    recipe_path = small_recipe(tmp_path / "job")
    found = {}
    for name, options in LAUNCHES.items():
        file, output = launch_file(tmp_path / "launch.yaml", **options), tmp_path / name.replace(" ", "_")
        done = train(
            file, recipe_path, *OVERRIDES, f"output_dir={output}", env={"FINETUNE_CACHE": str(tmp_path / "cache")}
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = steps(output)
    wanted = first_window(recipe_path, ranks=2)
    for name, rows in found.items():
        assert rows[0]["gradient_noise"] == pytest.approx(wanted.noise, rel=TOLERANCE), name
        assert rows[0]["gradient_signal"] == pytest.approx(wanted.signal, rel=TOLERANCE), name
        assert rows[0]["gradient_noise_scale"] == pytest.approx(wanted.noise / wanted.signal, rel=TOLERANCE), name
    plain = found.pop("DDP")
    assert len({row["rows"] for row in plain}) > 1, "the batch moved"
    assert {row["rows"] for row in plain} <= {4, 8, 16}
    assert len({row["gradient_accumulation_steps"] for row in plain}) > 1
    for row in plain:
        assert row["learning_rate"] > 0
    for name, rows in found.items():
        assert [row["rows"] for row in rows] == [row["rows"] for row in plain], name
        for key in ("gradient_noise", "gradient_signal", "loss", "learning_rate"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain], rel=TOLERANCE), (name, key)
