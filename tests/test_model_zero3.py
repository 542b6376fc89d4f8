"""ZeRO-3 splits the weights while they are loaded: no rank ever holds them all."""

from __future__ import annotations

import json

import pytest
from launch_support import ROOT, accelerate, launch_file
from tiny_models import SMALL, small_recipe

pytestmark = pytest.mark.slow


def test_no_rank_holds_the_whole_model(tmp_path, monkeypatch):
    tiny = small_recipe(tmp_path / "tiny")
    # 57 million parameters, 217 MiB: large against what loading itself takes (up to 80 MiB)
    monkeypatch.setitem(SMALL, "hidden_size", 384)
    monkeypatch.setitem(SMALL, "intermediate_size", 1152)
    monkeypatch.setitem(SMALL, "num_hidden_layers", 32)
    recipe = small_recipe(tmp_path / "job")
    config = launch_file(tmp_path / "launch.yaml", 2, zero_stage=3)
    result = accelerate(config, ROOT / "tests/launched/shards.py", tiny, recipe, tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["whole_here"] == 0
        assert rank["all_elements"] > 50_000_000
        assert rank["shards_here"] <= rank["all_elements"] / 2 + rank["parameters"]
    assert sum(rank["shards_here"] for rank in ranks) >= ranks[0]["all_elements"]
    # Its own shard is half; with a full copy on the way it would be 1.5. Rank 0 maps the file, which counts as its memory.
    assert ranks[1]["load_peak_bytes"] < 4 * ranks[1]["all_elements"]
