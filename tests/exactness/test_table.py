"""The launches of test_engines.py stand for the whole cross: every pair of factors that is allowed is in one of
them.
"""

from __future__ import annotations

import numpy as np
import pytest

from finetune.batching.layout import split_into_micro_batches
from finetune.launch import compatibility
from finetune.launch.config_file import read_launch_file
from finetune.recipe.load import load_recipe
from tests.support.exact_table import EVERY_LAUNCH, KINDS, KS, LAUNCHES, combinations, pairs, random_windows, windows
from tests.support.launch import launch_file

MOST_LAUNCHES = 16
RECIPE = """\
model: {name_or_path: base}
data: {train: [{path: chat.jsonl}]}
training: {global_batch_size: 8, per_device_train_batch_size: 2}
output_dir: run
"""


@pytest.fixture(scope="module")
def allowed(tmp_path_factory):
    """allowed(launch, kind): whether finetune/launch/compatibility.py lets them go together."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "chat.jsonl").write_text("{}\n")
    strategies = {row: read_launch_file(launch_file(folder / "launch.yaml", **row.layout)) for row in EVERY_LAUNCH}
    loaded = {kind: load_recipe(folder / "recipe.yaml", overrides) for kind, overrides in KINDS.items()}
    return lambda row, kind: not compatibility.refusals(loaded[kind], strategies[row])


def test_the_launches_cover_every_allowed_pair(allowed):
    assert len(set(LAUNCHES)) == len(LAUNCHES) <= MOST_LAUNCHES
    everything = combinations(EVERY_LAUNCH, allowed)
    assert len(EVERY_LAUNCH) == 24 and len(everything) == (24 * 3 - 8) * 4, "all but QLoRA under ZeRO-3"
    assert pairs(everything) == pairs(combinations(LAUNCHES, allowed))


def test_every_float32_engine_of_the_design_is_launched_on_two_ranks():
    assert {row.engine for row in LAUNCHES if row.precision == "no" and row.ranks == 2} == {
        row.engine for row in EVERY_LAUNCH
    }


def test_a_missing_launch_would_be_noticed(allowed):
    wanted = pairs(combinations(EVERY_LAUNCH, allowed))
    without = [row for row in LAUNCHES if (row.engine, row.precision) != ("ZeRO-3", "bf16")]
    assert (((0, "ZeRO-3"), (1, "bf16"))) in wanted - pairs(combinations(without, allowed))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_windows_have_every_k_and_an_empty_micro_batch(ranks):
    dealt = [split_into_micro_batches(range(window.rows), ranks, 2) for window in windows(ranks)]
    assert {len(share[0]) + w.empty for share, w in zip(dealt, windows(ranks), strict=True)} >= set(KS)
    assert any(w.empty for w in windows(ranks))
    if ranks > 1:
        assert any(() in share[-1] and () not in share[0] for share in dealt), (
            "one rank has nothing where the other has rows"
        )
    for window in random_windows(np.random.default_rng(1), ranks, 200):
        assert 1 <= len(split_into_micro_batches(range(window.rows), ranks, 2)[0]) + window.empty <= max(KS)
