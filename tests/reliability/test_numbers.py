"""A loss that is no number, on one rank only: the window is skipped on all of them, and several in a row end the
run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.forked import accelerate
from tests.support.launch import launch_file, program
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

POISONED = program("poisoned_run")
LAUNCHES = {
    "DDP": dict(ranks=2),
    "ZeRO-1": dict(ranks=2, zero_stage=1),
    "ZeRO-2, bf16": dict(ranks=2, zero_stage=2, precision="bf16"),
    "ZeRO-2 with offload, bf16": dict(ranks=2, zero_stage=2, offload_optimizer="cpu", precision="bf16"),
    "ZeRO-3 with offload": dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("numbers"))


def windows(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_window_that_is_no_number_on_one_rank_is_skipped_on_all(name, recipe, tmp_path):
    output = tmp_path / "run"
    file = launch_file(tmp_path / "launch.yaml", **LAUNCHES[name])
    done = accelerate(file, *POISONED, "2", recipe, "training.max_steps=5", f"output_dir={output}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "update 3 skipped: gradient is not finite (loss nan, norm " in done.stderr
    found = windows(output)
    assert not {"save", "stop", "position"} & set().union(*found), "for the loop alone"
    assert [row["window"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found] == [1, 2, 2, 3, 4, 5]
    assert [row["applied"] for row in found] == [True, True, False, True, True, True]
    assert found[2]["loss"] == "nan", "what it was, and not 0"
    assert found[3]["learning_rate"] == found[2]["learning_rate"], "a skipped window is no progress"
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in found if row["applied"])
    assert all(bool(t.isfinite().all()) for t in load_file(output / "model/model.safetensors").values())


def test_several_in_a_row_end_the_run_and_name_the_rows(recipe, tmp_path):
    output = tmp_path / "run"
    file = launch_file(tmp_path / "launch.yaml", ranks=1)
    done = accelerate(
        file, *POISONED, "2,3,4", recipe, "training.max_steps=5", "checkpoint.save_steps=1", f"output_dir={output}"
    )
    assert done.returncode != 0
    document = json.loads((output / "run.json").read_text())
    assert (document["status"], document["exit_code"]) == ("failed", 4)
    assert (
        document["message"].startswith(
            "training diverged at step 2: 3 consecutive updates skipped, loss or gradient not"
        )
        and "(loss nan, norm" in document["message"]
        and "Last batch: training rows " in document["message"]
    )
    assert not (output / "model").exists()
    assert (output / "checkpoints/latest").read_text().strip() == "step-2", "the last good one stays"


def test_a_loss_spike_ends_the_run_with_the_checkpoint_from_before_it(recipe, tmp_path):
    output = tmp_path / "run"
    file = launch_file(tmp_path / "launch.yaml", ranks=2)
    settings = [
        "training.max_steps=60",
        "checkpoint.save_steps=1",
        "evaluation.eval_steps=100",
        "training.lr_scheduler_type=constant",
    ]
    spiking = program("spiking_run")
    done = accelerate(file, *spiking, "40", recipe, *settings, f"output_dir={output}")
    document = json.loads((output / "run.json").read_text())
    assert (document["status"], document["exit_code"]) == ("failed", 4), done.stderr[-3000:]
    assert "loss spike: steps " in document["message"] and "Its first batch: training rows " in document["message"]
    assert document["message"] in done.stderr
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (output / "checkpoints").glob("step-*"))
    spike = [row["step"] for row in windows(output)][-3:]
    assert steps[-1] == spike[0] - 1, "every step was to be saved, and of the spike none was"
    settings[0] = f"training.max_steps={spike[-1] + 2}"
    allowed = "checkpoint.allow_changed=[training.stop_on_loss_spike, training.max_steps]"
    done = accelerate(
        file, *spiking, "40", recipe, *settings, allowed, "training.stop_on_loss_spike=false", f"output_dir={output}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming after step {steps[-1]}" in done.stderr and windows(output)[-1]["step"] == spike[-1] + 2
