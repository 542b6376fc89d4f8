"""The start-up check passes on every engine that works, and sees each factor of the scale when it is broken."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys

import pytest

from finetune.engine.scale_check import judge
from finetune.launch.strategy import Strategy
from tests.support import deepspeed_versions as measured
from tests.support.deepspeed_versions import KNOWN_BAD, known_of
from tests.support.forked import accelerate
from tests.support.launch import ROOT, launch_file, program, run

ENGINES = {
    "one rank": dict(ranks=1),
    "DDP": dict(ranks=2),
    "DDP, bf16": dict(ranks=2, precision="bf16"),
    "ZeRO-2": dict(ranks=2, zero_stage=2),
    "ZeRO-2 + CPU offload, bf16": dict(ranks=2, zero_stage=2, offload_optimizer="cpu", precision="bf16"),
    "ZeRO-3 + CPU offload": dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_passes_and_each_broken_factor_is_caught(name, tmp_path):
    config = launch_file(tmp_path / "launch.yaml", **ENGINES[name])
    result = accelerate(config, *program("scale_check"), tmp_path / "out.json")
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["again"].startswith("ok, windows of 4, 1 and 5 micro-batches"), "a broken check leaves nothing behind"
    assert found[""].startswith("ok, ")
    ranks = ENGINES[name]["ranks"]
    caught = {broken for broken, said in found.items() if said.startswith("scale check: ")}
    expected = {"forgets_k", "own_token_count", "loses_all_but_the_last", "steps_every_time"}
    assert caught >= expected | ({"forgets_world"} if ranks > 1 else set()), found
    assert "count 0.25 times what they must" in found["forgets_k"]
    assert "are lost" in found["loses_all_but_the_last"]
    if ranks > 1:
        assert "count 0.5 times what they must" in found["forgets_world"]
    for said in (found[b] for b in caught):
        assert f"accelerate {importlib.metadata.version('accelerate')}" in said
        assert ("deepspeed" in said) == ("zero_stage" in ENGINES[name])


def strategy(stage: int, offload: str = "none") -> Strategy:
    return Strategy("test", "deepspeed", 2, 1, "no", True, stage, offload)


def test_the_table_of_bad_releases_names_version_stage_and_offload():
    assert "3.4e-2" in known_of("0.17.6", strategy(2))
    assert known_of("0.17.6", strategy(3, "cpu")) == ""
    assert known_of("0.18.3", strategy(2)) == ""
    assert "0.16.9 to 0.18.5" in known_of("0.18.3", strategy(2, "cpu"))
    assert "crashes" in known_of("0.18.7", strategy(1, "cpu"))
    for row in KNOWN_BAD:
        for stage in row.stages:
            assert known_of("0.19.0", strategy(stage, "cpu" if row.offload else "none")) == ""


def test_the_committed_measurements_agree_with_the_table_and_the_page(tmp_path):
    folder = ROOT / "docs" / "benchmarks"
    results = json.loads((folder / "deepspeed-versions.json").read_text())
    wrong = [row for row in results["rows"] if measured.verdict(row.get("ours", row)) in ("wrong", "crashes")]
    assert len(results["rows"]) == 50 and wrong
    assert all(measured.agrees(row) for row in results["rows"])
    shutil.copy(folder / "deepspeed-versions.json", tmp_path)
    script = [sys.executable, "-m", "scripts.benchmarks.deepspeed_versions", "--versions", "", "--out", tmp_path]
    done = run(script, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "deepspeed-versions.md").read_text() == (folder / "deepspeed-versions.md").read_text()


def test_a_wrong_version_that_nothing_catches_stands_out():
    exact, wrong = [{"weight_difference": w, "norm_ratios": [n] * 4} for w, n in ((1e-7, 1.0), (1e-7, 0.5))]
    passes, refuses = [{"caught": caught, "exit_status": 4 * caught} for caught in (False, True)]
    row = {
        "version": "0.19.0",
        "layout": "ZeRO-2",
        "ours": exact,
        "accumulate": exact,
        "selfcheck": passes,
        "verify": passes,
    }
    assert measured.agrees(row) and measured.told(row) == "passes, status 0" and measured.cell(exact) == "1.0e-07"
    assert not measured.agrees(row | {"ours": wrong}), "AdamW hides a wrong factor, the norm shows it"
    assert not measured.agrees(row | {"verify": refuses})
    assert measured.agrees(row | {"version": "0.18.2", "ours": wrong, "selfcheck": refuses, "verify": refuses})
    crash = {"ours": {"crash": "RuntimeError"}, "selfcheck": refuses, "verify": refuses}
    assert not measured.agrees(row | crash), "caught, but KNOWN_BAD does not say so"
    assert measured.cell({"crash": "RuntimeError"}) == "**crashes**"


def test_a_weight_that_is_not_a_number_is_wrong():
    assert judge([1.0, 2.0], [1.0, 2.0], [(1.0, 1.0)], 1, (1,), 1e-5) == ""
    assert "nan" in judge([float("nan"), 2.0], [1.0, 2.0], [(1.0, 1.0)], 1, (1,), 1e-5)
    assert "norm is nan" in judge([1.0, 2.0], [1.0, 2.0], [(float("nan"), 1.0)], 1, (1,), 1e-5)
    assert "empty micro-batch" in judge([1.0, 0.1], [1.0, 0.0], [(1.0, 1.0)], 1, (1,), 1e-5)
