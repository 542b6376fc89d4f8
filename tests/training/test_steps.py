"""The loop's own arithmetic on a real job in this process: learning rates, clipping, and windows that apply nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.errors import Diverged
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.training import job
from finetune.training.step import clip_ratio, train
from tests.support.tiny_models import small_recipe


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function from overrides to a running job on one process; the engine is released afterwards."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path, running = small_recipe(tmp_path / "job"), []

    def start(*overrides: str) -> job.Job:
        plan = job.prepare(load_recipe(path, overrides), one_process(), print)
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


def test_clip_ratio_is_the_factor_on_the_gradient(start):
    assert [clip_ratio(norm, 1.0) for norm in (0.0, 0.5, 1.0, 4.0)] == [1.0, 1.0, 1.0, 0.25]
    assert clip_ratio(1e9, 0.0) == 1.0, "0 does not clip"
    assert clip_ratio(float("inf"), 1.0) == clip_ratio(float("nan"), 1.0) == 0.0
    job = start(
        "training.optim=sgd",
        "training.learning_rate=1.0",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.max_steps=2",
        "training.max_grad_norm=0.05",
    )
    before = job.engine.full_state_dict()
    for result in train(job):
        state = job.engine.full_state_dict()
        moved = torch.cat([(state[n] - before[n]).flatten() for n in state]).double().norm()
        before = state
        assert 0 < result.clip_ratio < 0.5
        assert moved.item() == pytest.approx(result.grad_norm * result.clip_ratio, rel=1e-4)


def last_norm(job) -> torch.nn.Parameter:
    return [p for name, p in job.engine.inner_model().named_parameters() if name.endswith("norm.weight")][-1]


def test_weights_that_are_not_finite_end_the_run_after_three_windows(start):
    job = start("training.max_steps=3")
    steps = train(job)
    next(steps)
    last_norm(job).data[0] = torch.inf
    assert [next(steps).applied for _ in range(3)] == [False] * 3
    with pytest.raises(
        Diverged, match=r"training diverged at step 1: 3 consecutive updates skipped.*Last batch: training rows "
    ):
        next(steps)


def test_a_skipped_window_is_reported_and_moves_neither_step_nor_learning_rate(start):
    job = start("training.max_steps=4", "training.warmup_steps=0", "training.lr_scheduler_type=linear")
    # fp16's loss scaler makes an overflow nobody's fault; there is none on the CPU, so only the loop is told of it
    job.engine.strategy = replace(job.engine.strategy, mixed_precision="fp16")
    steps = train(job)
    results = [next(steps)]
    before = {name: tensor.clone() for name, tensor in job.engine.inner_model().state_dict().items()}
    overflow = last_norm(job).register_hook(lambda gradient: gradient * torch.inf)
    results.append(next(steps))
    overflow.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.engine.inner_model().state_dict().items())
    results += steps
    assert [r.applied for r in results] == [True, False, True, True, True]
    assert [r.step for r in results] == [1, 1, 2, 3, 4]
    assert [r.window for r in results] == [1, 2, 3, 4, 5]
    assert [r.learning_rate for r in results] == pytest.approx([1e-2, 0.75e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert results[1].clip_ratio == 0.0


def test_a_growing_batch_takes_more_micro_batches(start):
    job = start("accumulation.schedule=warmup", "accumulation.warmup=[[0.2, 0.25], [0.5, 0.5], [1.0, 1.0]]")
    results = list(train(job))
    # 40 rows: progress 0, .05, .1, .15, .2, .3, .4, .5, .7, .9
    assert [r.rows for r in results] == [2, 2, 2, 2, 4, 4, 4, 8, 8, 4]
    assert [r.gradient_accumulation_steps for r in results] == [1, 1, 1, 1, 2, 2, 2, 4, 4, 2]
    assert results[-1].step == job.schedule.planned_steps == 10 and results[-1].epoch == 1.0
