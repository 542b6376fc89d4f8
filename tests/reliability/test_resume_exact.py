"""A run killed by SIGKILL and started again by the same command has the losses of an unbroken one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked import accelerate
from tests.support.launch import TRAIN, launch_file
from tests.support.resume_table import KILLED, KILLED_AT, RUNS, cross, differences, logged, overrides_of
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_is_bitwise_the_unbroken_run(name, recipe, tmp_path):
    run = RUNS[name]
    overrides = overrides_of(run, recipe, tmp_path)
    file = launch_file(tmp_path / "launch.yaml", **run.launch)
    cache = {"FINETUNE_CACHE": str(tmp_path / "cache")}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = accelerate(file, TRAIN, recipe, *overrides, f"output_dir={whole}", env=cache)
    assert done.returncode == 0, done.stderr[-4000:]
    killed = accelerate(file, *KILLED, str(KILLED_AT), recipe, *overrides, f"output_dir={broken}", env=cache)
    assert killed.returncode != 0
    assert max(row["step"] for row in logged(broken)) == KILLED_AT
    assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == ["latest", "step-12", "step-8"]
    done = accelerate(file, TRAIN, recipe, *overrides, f"output_dir={broken}", env=cache)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming after step 12" in done.stderr
    assert differences(broken, whole) == []


def test_the_cross_holds_every_combination():
    names = [name for name, _ in cross()]
    assert len(names) == len(set(names)) == 5 * 2 * 3 * 3 * 3
