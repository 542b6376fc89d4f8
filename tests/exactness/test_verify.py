"""`finetune verify`: equal under every kind of engine, one JSON document on stdout, status 4 when the engine is
wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT, launch_file, program, run
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

KEYS = {"passed", "model", "strategy", "scale", "versions", "cases"}
CASE_KEYS = {
    "name",
    "rows",
    "micro_batches",
    "gradient_norm_ratio",
    "gradient_difference",
    "weight_difference",
    "tolerance",
    "passed",
}
LAUNCHES = {
    "DDP": (dict(ranks=2), ()),
    "ZeRO-3 + CPU offload": (dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"), ()),
    "ZeRO-2, bf16, LoRA": (dict(ranks=2, zero_stage=2, precision="bf16"), ("lora.r=4",)),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("verify"), family="gemma3")


def verify(recipe: Path, tmp_path: Path, *arguments, program=("-m", "finetune", "verify"), env: dict | None = None):
    env = {"FINETUNE_CACHE": str(tmp_path / "cache")} | (env or {})
    return run([sys.executable, *program, recipe, "--json", *arguments], cwd=ROOT, env=env)


def checked(result) -> dict:
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)  # nothing else is there
    assert set(report) == KEYS and report["passed"]
    assert [case["name"] for case in report["cases"]] == [
        "configured window",
        "short window",
        "empty micro-batches",
        "K = 1",
    ]
    assert all(set(case) == CASE_KEYS and case["passed"] for case in report["cases"])
    assert report["cases"][0]["micro_batches"] >= 2 and report["cases"][-1]["micro_batches"] == 1
    return report


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_equals_one_batch(name, recipe, tmp_path):
    layout, overrides = LAUNCHES[name]
    launch = launch_file(tmp_path / "launch.yaml", **layout)
    # of the bf16 kernels these once made LoRA's gradient look wrong
    report = checked(
        verify(recipe, tmp_path, *overrides, "--launch", launch, env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})
    )
    assert report["scale"] == {"ranks": 2, "configured_steps": 2, "loss_times": 4}
    assert report["model"] == "Gemma3ForCausalLM, shrunk"


def test_the_real_model_in_one_process(recipe, tmp_path):
    report = checked(verify(recipe, tmp_path, "--full", "training.optim=adamw"))
    assert report["model"] == "Gemma3ForCausalLM"
    assert max(case["gradient_difference"] for case in report["cases"]) < 2e-6
    assert 0 < max(case["weight_difference"] for case in report["cases"]) < 1e-6


def test_a_wrong_scale_ends_with_status_4(recipe, tmp_path):
    unclipped = (  # clipping brings a wrong scale back to the same step, and only the norm tells
        "training.max_grad_norm=0"
    )
    result = verify(recipe, tmp_path, unclipped, program=program("broken_verify"))
    assert result.returncode == 4, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert not report["passed"]
    assert [round(case["gradient_norm_ratio"], 3) for case in report["cases"]] == [0.25] * 4
    assert min(case["weight_difference"] for case in report["cases"]) > 1e-2
    assert "differ from one big batch" in result.stderr
