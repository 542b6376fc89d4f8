"""K micro-batches on N ranks under any engine equal one big batch: DESIGN section 7's figures, on real engines.

One launch per engine runs every case of tests/launched/exactness.py. The update of an SGD step is the clipped gradient
itself (times the learning rate), read off the weights; float32 limits how exactly a difference of weights can be read, which
is what the tolerance is for.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch_support import ROOT, accelerate, launch_file
from tiny_models import small_recipe

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6  # DESIGN section 7: relative L2 of the clipped gradient, and of weights after four steps
ENGINES = {
    "one rank": dict(ranks=1),
    "DDP": dict(ranks=2),
    "ZeRO-1": dict(ranks=2, zero_stage=1),
    "ZeRO-2": dict(ranks=2, zero_stage=2),
    "ZeRO-3": dict(ranks=2, zero_stage=3),
    "ZeRO-2 + CPU offload": dict(ranks=2, zero_stage=2, offload_optimizer="cpu"),
    "ZeRO-3 + CPU offload": dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module", params=ENGINES)
def cases(request, recipe, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("engine")
    config = launch_file(folder / "launch.yaml", **ENGINES[request.param])
    result = accelerate(config, ROOT / "tests/launched/exactness.py", recipe, folder / "out.json", timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((folder / "out.json").read_text())
    assert found["ranks"] == ENGINES[request.param]["ranks"]
    return {case["name"]: case for case in found["cases"]}


def gradient_error(case: dict) -> float:
    """The worst of all windows, each from the same weights: relative L2 of the update, and of the norm before clipping."""
    return max(max(w["update_difference"], abs(w["norm_ratio"] - 1)) for w in case["windows_run"])


def test_accumulated_gradient_and_weights_equal_one_batch(cases):
    for name in ("full, SGD", "LoRA, SGD"):
        case = cases[name]
        assert case["start_difference"] == 0.0  # the same weights on both sides, bit for bit
        assert [w["rows"] for w in case["windows_run"]] == [16, 16, 7, 2, 1, 40]
        assert all(w["applied"] for w in case["windows_run"])
        assert {1} < {w["K"] for w in case["windows_run"]}, "windows with K = 1 and more"
        assert gradient_error(case) <= TOLERANCE, (name, case)
    for name in ("full, SGD", "LoRA, SGD", "full, AdamW", "LoRA, AdamW"):
        assert cases[name]["weight_difference"] <= TOLERANCE, (name, cases[name])


def test_a_broken_scale_is_seen(cases):
    broken = [case for case in cases.values() if case["broken"]]
    assert {"mean of means", "K"} <= {case["broken"] for case in broken}
    for case in broken:
        assert gradient_error(case) > 1e-2, case
