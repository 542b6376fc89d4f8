"""per_device_train_batch_size: auto fits its budget and no larger one would; the trial on the device; the largest
micro-batch of a run.
"""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from finetune.batching.layout import largest_micro_batches, split_into_micro_batches
from tests.support.forked import accelerate, run, train
from tests.support.launch import ROOT, launch_file, program
from tests.support.tiny_models import small_recipe

AUTO = [
    "training.global_batch_size=24",
    "training.per_device_train_batch_size=auto",
    "training.max_steps=3",
    "evaluation.eval_steps=100",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_recipe(tmp_path_factory.mktemp("auto"), rows=60)


def memory_of(output) -> tuple[dict, dict]:
    document = json.loads((output / "run.json").read_text())
    return document["memory"], document["plan"]["batch"]


@pytest.mark.parametrize(
    "rows, window, per_device, ranks",
    [(50, 16, 4, 1), (7, 8, 2, 2), (33, 10, 5, 1), (40, 12, 3, 2), (1, 4, 4, 1), (5, 4, 4, 1)],
)
def test_the_largest_micro_batches_are_those_that_dealing_finds(rows, window, per_device, ranks):
    choose = np.random.default_rng(rows)
    for _ in range(20):
        lengths, order = choose.integers(1, 30, rows), choose.permutation(rows)
        dealt = [
            (k > 0, lengths[list(part)])
            for first in range(0, rows, window)
            for of_rank in split_into_micro_batches(order[first : first + window].tolist(), ranks, per_device)
            for k, part in enumerate(of_rank)
            if part
        ]
        wanted = [
            max((len(part) * part.max(), part.min() < part.max()) for is_later, part in dealt if is_later == later)
            for later in sorted({is_later for is_later, _ in dealt})
        ]
        found = largest_micro_batches(lengths, order, window, per_device, ranks)
        assert [(count * longest, padded) for count, longest, padded in found] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("budget, rows", [("1MiB", 1), ("2MiB", 4), ("1GiB", 24)])
def test_auto_takes_the_largest_micro_batch_that_fits_and_the_run_stays_below(small, tmp_path, budget, rows):
    output = tmp_path / "run"
    done = run(
        [
            sys.executable,
            ROOT / "finetune/train.py",
            small,
            *AUTO,
            f"training.device_memory={budget}",
            f"output_dir={output}",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    memory, batch = memory_of(output)
    assert (batch["per_device_rows"], batch["accumulation_steps"], batch["open"]) == (rows, 24 // rows, False)
    limit = {"1MiB": 2**20, "2MiB": 2**21, "1GiB": 2**30}[budget]
    assert memory["measured"]["tracked_peak_bytes"] == memory["predicted"]["step_bytes"] <= limit
    assert f"auto: {rows} row{'s' * (rows > 1)} of at most 64 tokens per micro-batch take" in done.stderr
    assert (rows == 24) == ("would take" not in done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_auto_stays_below_its_budget_on_two_ranks(small, tmp_path, stage):
    file = launch_file(tmp_path / "launch.yaml", 2, zero_stage=stage, offload_optimizer="cpu" if stage else "none")
    done = train(file, small, *AUTO, "training.device_memory=2.5MiB", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    memory, batch = memory_of(tmp_path / "run")
    assert 1 <= batch["per_device_rows"] < 12 and batch["per_device_rows"] * batch["accumulation_steps"] == 12
    assert memory["measured"]["tracked_peak_bytes"] <= 2.5 * 2**20


@pytest.mark.slow
def test_a_device_that_disagrees_gets_the_next_smaller_micro_batch_and_the_same_global_batch(tmp_path):
    small = small_recipe(tmp_path / "many", rows=700)
    output = tmp_path / "run"
    sizes = ["training.global_batch_size=256", "training.per_device_train_batch_size=auto", "training.max_steps=2"]
    done = run([sys.executable, *program("tight_trial"), small, *sizes, f"output_dir={output}"])
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "run out of memory here" in line]
    assert said == [
        "auto: 256 rows per micro-batch run out of memory here (out of host memory): 256 rows per optimizer step = 128"
        " rows per micro-batch x K=2 micro-batches x 1 rank."
    ]
    memory, batch = memory_of(output)
    assert (batch["global_batch_rows"], batch["per_device_rows"], batch["accumulation_steps"]) == (256, 128, 2)
    assert memory["error"]["tracked"] == 0


@pytest.mark.slow
def test_ranks_that_would_choose_different_micro_batches_are_refused_before_weights_are_read(small, tmp_path):
    file, output = launch_file(tmp_path / "launch.yaml", 2), f"output_dir={tmp_path / 'run'}"
    done = accelerate(file, *program("unequal_devices"), small, *AUTO, output, timeout=120)
    assert done.returncode != 0
    assert re.search(
        r"the ranks' devices differ: they would take \[1, [234]\] rows per micro-batch. Set training.device_memory",
        done.stderr,
    )
    assert "writing the model" not in done.stderr
