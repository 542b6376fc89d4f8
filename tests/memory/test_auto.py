"""per_device_train_batch_size: auto fits its budget and no larger one would; the trial on the device; the largest
micro-batch of a run.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest

from finetune.batching.windows import Position, next_window
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.recipe.sizes import parse_bytes
from finetune.training.forecast import largest_shapes
from finetune.training.job import prepare
from tests.support.forked import accelerate, run, train
from tests.support.launch import ROOT, launch_file, program
from tests.support.tiny_models import small_recipe

AUTO = [
    "training.global_batch_size=24",
    "training.per_device_train_batch_size=auto",
    "training.max_steps=3",
    "evaluation.eval_steps=100",
]
PADDED = "data.packing=false"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_recipe(tmp_path_factory.mktemp("auto"), rows=60)


def memory_of(output) -> tuple[dict, dict]:
    document = json.loads((output / "run.json").read_text())
    return document["memory"], document["plan"]["batch"]


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("window, per_device, ranks", [(16, 4, 1), (8, 2, 2), (10, 5, 1), (12, 3, 2), (4, 4, 1)])
def test_the_micro_batches_that_are_forecast_are_the_largest_of_the_run(small, packing, window, per_device, ranks):
    sizes = [f"training.global_batch_size={window}", f"training.per_device_train_batch_size={per_device}"]
    loaded = load_recipe(small, [*sizes, f"data.packing={packing}", "training.num_train_epochs=2.5"])
    plan = prepare(loaded, dataclasses.replace(one_process(use_cpu=True), ranks=ranks), lambda line: None)
    lengths, trained = plan.data.train.lengths, plan.data.train.trained
    most: dict = {}
    position = Position()
    while taken := next_window(position, len(lengths), window, loaded.recipe.training.seed, 2.5):
        position = position.after(taken, True)
        dealt = plan.batch.deal(taken.rows, [int(lengths[i]) for i in taken.rows])
        for k, part in ((k, list(part)) for of_rank in dealt for k, part in enumerate(of_rank) if part):
            tokens = lengths[part].sum() if packing == "true" else len(part) * lengths[part].max()
            seen = most.get(k > 0, (0, 0))
            most[k > 0] = (max(seen[0], int(tokens)), max(seen[1], int(trained[part].sum())))
    found: dict = {}
    for shape, later in largest_shapes(plan):
        seen = found.get(later, (0, 0))
        found[later] = (max(seen[0], shape.positions), max(seen[1], shape.predicting))
    assert found[max(most)] == most[max(most)]
    if False in found and True in found:  # a first one is asked for only where it is larger in something
        assert any(one > other for one, other in zip(found[False], found[True], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("budget, rows", [("800KiB", 1), ("1.5MiB", 4), ("1GiB", 24)])
def test_auto_takes_the_largest_micro_batch_that_fits_and_the_run_stays_below(small, tmp_path, budget, rows):
    output = tmp_path / "run"
    done = run(
        [
            sys.executable,
            ROOT / "finetune/train.py",
            small,
            *AUTO,
            PADDED,
            f"training.device_memory={budget}",
            f"output_dir={output}",
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    memory, batch = memory_of(output)
    assert (batch["per_device_rows"], batch["accumulation_steps"], batch["open"]) == (rows, 24 // rows, False)
    limit = parse_bytes(budget)
    assert memory["measured"]["tracked_peak_bytes"] == memory["predicted"]["step_bytes"] <= limit
    assert f"auto: {rows} row{'s' * (rows > 1)} of at most 64 tokens per micro-batch take" in done.stderr
    assert (rows == 24) == ("would take" not in done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_auto_stays_below_its_budget_on_two_ranks(small, tmp_path, stage):
    file = launch_file(tmp_path / "launch.yaml", 2, zero_stage=stage, offload_optimizer="cpu" if stage else "none")
    overrides = [*AUTO, PADDED, "training.device_memory=2.5MiB", f"output_dir={tmp_path / 'run'}"]
    done = train(file, small, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    memory, batch = memory_of(tmp_path / "run")
    assert 1 <= batch["per_device_rows"] < 12 and batch["per_device_rows"] * batch["accumulation_steps"] == 12
    assert memory["measured"]["tracked_peak_bytes"] <= 2.5 * 2**20


@pytest.mark.slow
def test_a_device_that_disagrees_gets_the_next_smaller_micro_batch_and_the_same_global_batch(tmp_path):
    small = small_recipe(tmp_path / "many", rows=700)
    output = tmp_path / "run"
    sizes = [
        "training.global_batch_size=256",
        "training.per_device_train_batch_size=auto",
        "training.max_steps=2",
        PADDED,
    ]
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
    done = accelerate(file, *program("unequal_devices"), small, *AUTO, PADDED, output, timeout=120)
    assert done.returncode != 0
    assert re.search(
        r"the ranks' devices differ: they would take \[1, 6\] rows per micro-batch. Set training.device_memory",
        done.stderr,
    )
    assert "writing the model" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("budget, tokens", [("800KiB", 64), ("1.5MiB", 320)])
def test_auto_takes_the_most_tokens_that_fit_a_packed_micro_batch(small, tmp_path, budget, tokens):
    output = f"output_dir={tmp_path / 'run'}"
    done = run([sys.executable, ROOT / "finetune/train.py", small, *AUTO, f"training.device_memory={budget}", output])
    assert done.returncode == 0, done.stderr[-3000:]
    memory, batch = memory_of(tmp_path / "run")
    assert (batch["per_device_rows"] * batch["row_tokens"], batch["open"]) == (tokens, False)
    assert memory["measured"]["tracked_peak_bytes"] == memory["predicted"]["step_bytes"] <= parse_bytes(budget)
    assert f"auto: {tokens} tokens, " in done.stderr and "; " in done.stderr
