"""ZeRO-3 splits the weights while they are loaded: after it every rank holds its shard."""

from __future__ import annotations

import json

import pytest

from tests.support.forked import accelerate
from tests.support.launch import launch_file, program
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow


def test_every_rank_holds_its_shard_and_no_whole_weight(tmp_path):
    recipe = small_recipe(tmp_path / "job")
    config = launch_file(tmp_path / "launch.yaml", 2, zero_stage=3)
    result = accelerate(config, *program("shards"), recipe, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["whole_here"] == 0
        assert rank["shards_here"] <= rank["all_elements"] / 2 + rank["parameters"]  # padded to an even split
    assert sum(rank["shards_here"] for rank in ranks) >= ranks[0]["all_elements"]
