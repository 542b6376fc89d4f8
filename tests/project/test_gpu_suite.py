"""The GPU suite's small run on the CPU, for real: every case that applies is done, and one that dies or hangs is a row
of the result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest

from tests.support.launch import ROOT, run

pytestmark = pytest.mark.slow

SUITE = ROOT / "scripts/gpu_suite.sh"
KEYS = {"date", "command", "commit", "small", "minutes", "versions", "environment", "machine", "cases", "overheads"}
ROW = {"name", "group", "status", "why", "seconds", "figures", "output"}
NOT_HERE = {
    "exactness: fp16 with overflow",
    "memory: ZeRO-3 + NVMe offload",
}  # no loss scaler; and, if so, no built async_io


def suite(out: Path, *arguments: str, code: int = 0) -> dict:
    """The JSON of a small run; its page has a line for every case, and nothing is left of its work."""
    result = run([SUITE, "--cpu-small", "--out", out, *arguments], timeout=880)
    assert result.returncode == code, result.stderr[-4000:]
    assert sorted(path.name for path in out.iterdir()) == ["gpu_suite.json", "gpu_suite.md"]
    document = json.loads((out / "gpu_suite.json").read_text())
    assert set(document) == KEYS and all(set(row) == ROW for row in document["cases"])
    page = (out / "gpu_suite.md").read_text()
    for row in document["cases"]:
        assert f"| {row['name']} | {row['status']} | {row['seconds']:.0f} | {row['why']} |" in page
    return document | {"page": page}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return suite(tmp_path_factory.mktemp("whole") / "out", "--minutes", "14")


def figures(document: dict, group: str) -> dict[str, dict]:
    return {
        row["name"]: row["figures"] for row in document["cases"] if row["group"] == group and row["status"] == "done"
    }


def test_every_case_that_applies_is_done(whole):
    assert {row["name"] for row in whole["cases"] if row["status"] != "done"} <= NOT_HERE, whole["cases"]
    assert all(row["why"] for row in whole["cases"] if row["status"] != "done")
    assert {group: len(figures(whole, group)) for group in ("prepare", "exactness", "throughput")} == {
        "prepare": 2,
        "exactness": 5,
        "throughput": 2,
    }
    assert len(figures(whole, "memory")) >= 9


def test_the_exactness_figures_keep_their_limits(whole):
    for name, found in figures(whole, "exactness").items():
        assert found and all(f["limit"] is None or f["value"] <= f["limit"] for f in found), (name, found)


def test_json_and_page_say_the_same(whole):
    page = whole["page"]
    for name, found in figures(whole, "memory").items():
        assert found["host_resident_bytes"] > 100 * 2**20
        line = next(line for line in page.splitlines() if line.startswith(f"| {name.removeprefix('memory: ')} | "))
        assert f"| {found['host_resident_bytes'] / 2**20:,.1f} |" in line
    for found in figures(whole, "throughput").values():
        assert [window["K"] for window in found["windows"]] == [1, 2, 4]
        for window in found["windows"]:
            assert window["mfu"] is None  # nobody knows a CPU's peak
            assert f"| {window['K']} | {window['window_seconds']:.3f} | {window['tokens_per_second']:,.0f} |" in page
    for overhead in whole["overheads"]:
        assert overhead["name"] in page


def test_half_of_the_cases_fit_an_overhead_and_the_others_test_it(whole):
    memory = figures(whole, "memory")
    seen = [name for name, f in memory.items() if f["tracked_bytes"] is not None]
    (host,) = [o for o in whole["overheads"] if o["name"] == "host: resident over tracked tensors"]
    if len(seen) < 2:
        assert (host["constant_bytes"], host["fitted_on"], host["residual_bytes"]) == (None, [], {})
        return
    assert (host["fitted_on"], list(host["residual_bytes"])) == (seen[::2], seen[1::2])
    for name, residual in host["residual_bytes"].items():
        resident, tracked = memory[name]["host_resident_bytes"], memory[name]["tracked_bytes"]
        assert resident - tracked == host["constant_bytes"] + residual


def test_a_case_that_hangs_or_is_killed_is_a_row_and_nothing_of_it_stays(tmp_path):
    document = suite(tmp_path / "out", "--only", "selftest", code=4)
    hung, killed = document["cases"]
    assert (hung["status"], killed["status"]) == ("timeout", "failed")
    assert killed["why"] == "killed by SIGKILL" and killed["output"] == ["about to be killed"]
    child = int(re.fullmatch(r"started (\d+)", hung["output"][-1])[1])  # it led a session of its own
    assert not psutil.pid_exists(child) or psutil.Process(child).name() != "sleep"
    assert "about to be killed" in document["page"]


def test_what_does_not_fit_into_the_minutes_is_listed(tmp_path):
    document = suite(tmp_path / "out", "--minutes", "0")
    assert document["cases"] and all(
        (row["status"], row["why"]) == ("not run", "time") for row in document["cases"] if row["name"] not in NOT_HERE
    )


def test_the_small_run_asks_for_a_folder_and_an_unknown_case_is_named(tmp_path):
    result = run([SUITE, "--cpu-small"])
    assert result.returncode == 2 and "--cpu-small needs --out FOLDER" in result.stderr
    result = run([SUITE, "--cpu-small", "--out", tmp_path, "--only", "memory: all"])
    assert result.returncode == 2 and "'memory: all' is neither a group nor a case" in result.stderr
