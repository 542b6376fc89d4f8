"""The loop's own arithmetic on a real job in this process: learning rates, clipping, and windows that apply nothing."""

from __future__ import annotations

import pytest
from tiny_models import small_recipe

from finetune import job, launch, recipe
from finetune.loop import train


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function from overrides to a running job on one process; the engine is released afterwards."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path, running = small_recipe(tmp_path / "job"), []

    def start(*overrides: str) -> job.Job:
        plan = job.prepare_plan(recipe.load(path, overrides), launch.one_process(), print)
        running.append(job.assemble(plan, print))
        return running[-1]

    yield start
    for each in running:
        each.engine.release()


def test_the_scaled_learning_rate_is_what_steps_use_and_log(start):
    scaled = ("training.learning_rate=2e-4", "training.lr_scaling=sqrt", "training.reference_batch_size=2")
    job = start(*scaled, "training.lr_scheduler_type=linear", "training.warmup_steps=0", "training.max_steps=4")
    # 2e-4 x sqrt(8/2) = 4e-4, falling to 0 in four steps
    assert [result.learning_rate for result in train(job)] == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])
    assert job.engine.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
