"""1 rank x K = 8, 2 x 4 and 4 x 2 through the ordinary trainer: the same windows and the same loss curve over 50
steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked import train
from tests.support.launch import launch_file
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

STEPS, GLOBAL_ROWS, PER_DEVICE = 50, 16, 2
TOLERANCE = 1e-5  # nats per token, as in test_same_losses.py
PACKED = {1: False, 2: True, 4: True}  # by ranks: another layout is one more thing that changes nothing
OVERRIDES = (
    f"training.max_steps={STEPS}",
    f"training.global_batch_size={GLOBAL_ROWS}",
    f"training.per_device_train_batch_size={PER_DEVICE}",
    "training.learning_rate=1e-3",
    "training.adam_epsilon=1e-6",  # with 1e-8 AdamW makes rounding visible where gradients are next to nothing
    "evaluation.eval_steps=50",
)


@pytest.fixture(scope="module", params=[0, 2], ids=["DDP", "ZeRO-2"])
def runs(request, tmp_path_factory) -> dict[int, list[dict]]:
    """The training rows of metrics.jsonl by number of ranks."""
    folder = tmp_path_factory.mktemp("worlds")
    recipe = small_recipe(folder / "recipe")
    found = {}
    for ranks, packed in PACKED.items():
        config, output = launch_file(folder / f"{ranks}.yaml", ranks, zero_stage=request.param), folder / f"run{ranks}"
        done = train(
            config,
            recipe,
            *OVERRIDES,
            f"data.packing={str(packed).lower()}",
            f"output_dir={output}",
            cwd=folder,
            env={"FINETUNE_CACHE": str(folder / "cache")},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[ranks] = training_rows(output)
    return found


def training_rows(output: Path) -> list[dict]:
    return [row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_windows_are_the_same_and_k_is_derived(runs):
    for ranks, rows in runs.items():
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        for row, plain in zip(rows, runs[1], strict=True):
            assert [row[n] for n in ("rows", "tokens", "input_tokens", "epoch", "learning_rate")] == [
                plain[n] for n in ("rows", "tokens", "input_tokens", "epoch", "learning_rate")
            ]
            padded_steps = -(-row["rows"] // (PER_DEVICE * ranks))
            assert row["gradient_accumulation_steps"] <= padded_steps
            assert PACKED[ranks] or row["gradient_accumulation_steps"] == padded_steps
        most = max(row["gradient_accumulation_steps"] for row in rows)
        assert PACKED[ranks] or most == 8 // ranks
    assert len({row["rows"] for row in runs[1]}) > 1, "an epoch's last window is short"


def test_the_loss_curve_is_the_same(runs):
    plain = [row["loss"] for row in runs[1]]
    assert plain[-1] < 0.9 * plain[0], "it trains"
    worst = {n: max(abs(a["loss"] - b) for a, b in zip(rows, plain, strict=True)) for n, rows in runs.items()}
    print(f"worst difference of the loss by ranks: {worst}")
    assert max(worst.values()) <= TOLERANCE, worst
