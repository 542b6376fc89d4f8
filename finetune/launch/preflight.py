"""Everything that can be wrong before torch is imported: recipe, launch file, their combination, batch arithmetic."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from finetune.batching.learning_rate import batch_schedule, lr_scaling
from finetune.batching.windows import BatchPlan, plan_batch
from finetune.errors import UserError
from finetune.launch import compatibility
from finetune.launch import strategy as launch
from finetune.launch.strategy import Strategy
from finetune.recipe import load as recipe
from finetune.recipe.load import Loaded

T = TypeVar("T")
MANY_MICRO_BATCHES = 16  # K above this without clipping is warned about


@dataclass(frozen=True)
class Settled:
    """A recipe and a strategy that go together: who owns which knob is decided, every batch number is known."""

    loaded: Loaded
    strategy: Strategy
    batch: BatchPlan
    max_grad_norm: float


def first_stage(recipe_path: str, overrides: Sequence[str], launch_file: str | None) -> Settled:
    """Read recipe and launch file (None: one process) and settle them. Raises UserError with all problems of both."""
    problems: list[str] = []
    loaded = collect(problems, lambda: recipe.load(recipe_path, overrides))
    strategy = collect(problems, lambda: launch.read(launch_file) if launch_file else launch.one_process())
    if loaded is None or strategy is None:
        raise UserError(problems)
    return settle(loaded, strategy)


def settle(loaded: Loaded, strategy: Strategy) -> Settled:
    """Check the combination and derive the batch. Raises UserError with every problem."""
    problems = compatibility.refusals(loaded, strategy) + _trackers_not_installed(loaded)
    planned = collect(problems, lambda: plan_batch(loaded, strategy))
    if planned is not None:
        problems += _too_few_to_measure(loaded, planned[0])
    if problems or planned is None:
        raise UserError(problems)
    batch, max_grad_norm = planned
    return Settled(loaded, strategy, batch, max_grad_norm)


def _trackers_not_installed(loaded: Loaded) -> list[str]:
    key = "logging.report_to"
    return [
        f"{loaded.where(key)}: {key} names {name}, which is not installed here. `pip install {name}`, or leave it out."
        for name in loaded.recipe.logging.report_to
        if importlib.util.find_spec(name) is None
    ]


def _too_few_to_measure(loaded: Loaded, batch: BatchPlan) -> list[str]:
    """An adaptive batch needs two micro-batches with rows in its smallest window: noise is what they differ by."""
    accumulation = loaded.recipe.accumulation
    if accumulation.schedule != "adaptive":
        return []
    smallest = _smallest_window(loaded, batch)
    if smallest > batch.per_device_rows:
        return []
    key = "accumulation.smallest"
    enough = 2.0 ** math.ceil(math.log2((batch.per_device_rows + 1) / batch.global_batch_rows))
    change = f"Use smallest {enough:g}, or a smaller micro-batch." if enough <= 1 else "Use a smaller micro-batch."
    return [
        f"{loaded.where(key)}: {key} is {accumulation.smallest:g}, so the smallest batch is {smallest}"
        f" row{'s' * (smallest != 1)}, one micro-batch of {batch.per_device_rows}. The gradient noise is measured"
        f" between the micro-batches of a window: at least two must have rows. {change}"
    ]


def _smallest_window(loaded: Loaded, batch: BatchPlan) -> int:
    schedule = batch_schedule(
        loaded.recipe.accumulation, batch.global_batch_rows, loaded.recipe.training.num_train_epochs
    )
    return schedule.rows(0.0, schedule.least_doublings)


def fewest_rows(settled: Settled) -> float:
    """A micro-batch must have fewer rows than this: an adaptive batch needs two of them in its smallest window."""
    if settled.loaded.recipe.accumulation.schedule != "adaptive":
        return math.inf
    return _smallest_window(settled.loaded, settled.batch)


def learning_rate_line(loaded: Loaded, batch: BatchPlan) -> str:
    """The peak learning rate at the full global batch, and how it comes about."""
    training = loaded.recipe.training
    line = lr_scaling(training).line(training.learning_rate, batch.global_batch_rows)
    smaller = training.lr_scaling != "none" and loaded.recipe.accumulation.schedule != "constant"
    return line + (" (and with the batch from step to step)" if smaller else "")


def batch_line(loaded: Loaded, batch: BatchPlan) -> str:
    """The global batch and its factors, and the others that the schedule brings."""
    epochs = loaded.recipe.training.num_train_epochs
    schedule = batch_schedule(loaded.recipe.accumulation, batch.global_batch_rows, epochs)
    return batch.line() + (f"; {batch.stages_line(schedule)}" if schedule.varies or schedule.adapts else "")


def advice(loaded: Loaded, batch: BatchPlan, max_grad_norm: float) -> list[str]:
    """One line each for what runs as asked but is worth a second thought."""
    if batch.open or batch.accumulation_steps <= MANY_MICRO_BATCHES or max_grad_norm > 0:
        return []
    key = "training.max_grad_norm"
    return [
        f"warning: {loaded.where(key)}: {key} is 0, so nothing clips the gradient of K={batch.accumulation_steps}"
        " micro-batches: one bad row moves the weights unchecked. Use 1.0 unless you mean it."
    ]


def collect(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; where it raises UserError its messages are added to `problems`, and None is returned."""
    try:
        return read()
    except UserError as error:
        problems += error.messages
        return None
