"""Everything that can be wrong before torch is imported: recipe, launch file, their combination, batch arithmetic."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from finetune.batching.batch_size import batch_schedule
from finetune.batching.learning_rate import lr_scaling
from finetune.batching.plan import BatchPlan, derive_batch
from finetune.errors import UserError
from finetune.launch import compatibility
from finetune.launch.config_file import read_launch_file
from finetune.launch.strategy import Strategy, one_process
from finetune.recipe.load import LoadedRecipe, load_recipe
from finetune.report.text import count

T = TypeVar("T")
MANY_MICRO_BATCHES = 16  # K above this without clipping is warned about


@dataclass(frozen=True)
class Resolved:
    """A recipe and a strategy that are compatible, with every batch number known."""

    loaded: LoadedRecipe
    strategy: Strategy
    batch: BatchPlan
    max_grad_norm: float


def first_stage(recipe_path: str, overrides: Sequence[str], launch_file: str | None) -> Resolved:
    """Read recipe and launch file (None: one process) and resolve them. Raises UserError with all problems of both."""
    problems: list[str] = []
    loaded = collect(problems, lambda: load_recipe(recipe_path, overrides))
    strategy = collect(problems, lambda: read_launch_file(launch_file) if launch_file else one_process())
    if loaded is None or strategy is None:
        raise UserError(problems)
    return resolve(loaded, strategy)


def resolve(loaded: LoadedRecipe, strategy: Strategy) -> Resolved:
    """Check recipe and strategy together and derive the batch. Raises UserError with every problem."""
    problems = compatibility.refusals(loaded, strategy) + _trackers_not_installed(loaded)
    planned = collect(problems, lambda: plan_batch(loaded, strategy))
    if planned is not None:
        problems += too_few_to_measure(loaded, planned[0])
    if problems or planned is None:
        raise UserError(problems)
    batch, max_grad_norm = planned
    return Resolved(loaded, strategy, batch, max_grad_norm)


def _trackers_not_installed(loaded: LoadedRecipe) -> list[str]:
    key = "logging.report_to"
    return [
        f"{loaded.location(key)}: {key} names {name}, which is not installed here. `pip install {name}`, or leave it"
        " out."
        for name in loaded.recipe.logging.report_to
        if importlib.util.find_spec(name) is None
    ]


def too_few_to_measure(loaded: LoadedRecipe, batch: BatchPlan) -> list[str]:
    """The problem, if any, that an adaptive batch's smallest window has fewer than two micro-batches with rows.

    The gradient noise is what the micro-batches of a window differ by.
    """
    accumulation = loaded.recipe.accumulation
    if accumulation.schedule != "adaptive":
        return []
    smallest = _smallest_window(loaded, batch)
    # packed, a window is laid out in two micro-batches where it has two rows
    if smallest > (batch.per_device_rows if batch.row_tokens is None else 1):
        return []
    key = "accumulation.smallest"
    needed = batch.per_device_rows + 1 if batch.row_tokens is None else 2
    enough = 2.0 ** math.ceil(math.log2(needed / batch.global_batch_rows))
    change = f"Use smallest {enough:g}, or a smaller micro-batch." if enough <= 1 else "Use a smaller micro-batch."
    if batch.row_tokens is not None:
        change = f"Use smallest {enough:g}." if enough <= 1 else "Use a larger training.global_batch_size."
    return [
        f"{loaded.location(key)}: {key} is {accumulation.smallest:g}, so the smallest batch is"
        f" {count(smallest, 'row')}, one micro-batch. The gradient noise is measured between"
        f" the micro-batches of a window: at least two must have rows. {change}"
    ]


def _smallest_window(loaded: LoadedRecipe, batch: BatchPlan) -> int:
    recipe = loaded.recipe
    schedule = batch_schedule(recipe.accumulation, batch.global_batch_rows, recipe.training.num_train_epochs)
    return schedule.rows(0.0, schedule.least_doublings)


def fewest_rows(settled: Resolved) -> float:
    """A micro-batch must have fewer rows than this: an adaptive batch needs two of them in its smallest window."""
    if settled.loaded.recipe.accumulation.schedule != "adaptive" or settled.batch.row_tokens is not None:
        return math.inf
    return _smallest_window(settled.loaded, settled.batch)


def learning_rate_line(loaded: LoadedRecipe, batch: BatchPlan) -> str:
    """The peak learning rate at the full global batch, and how it comes about."""
    training = loaded.recipe.training
    line = lr_scaling(training).line(training.learning_rate, batch.global_batch_rows)
    smaller = training.lr_scaling != "none" and loaded.recipe.accumulation.schedule != "constant"
    return line + (" (and with the batch from step to step)" if smaller else "")


def batch_line(loaded: LoadedRecipe, batch: BatchPlan) -> str:
    """The global batch and its factors, and how the schedule changes them over the run."""
    epochs = loaded.recipe.training.num_train_epochs
    schedule = batch_schedule(loaded.recipe.accumulation, batch.global_batch_rows, epochs)
    return batch.line() + (f"; {batch.stages_line(schedule)}" if schedule.varies or schedule.adapts else "")


def advice(loaded: LoadedRecipe, batch: BatchPlan, max_grad_norm: float) -> list[str]:
    """Warnings, one line each, about settings that run but are risky."""
    if batch.open or batch.accumulation_steps <= MANY_MICRO_BATCHES or max_grad_norm > 0:
        return []
    key = "training.max_grad_norm"
    return [
        f"warning: {loaded.location(key)}: {key} is 0, so nothing clips the gradient of K={batch.accumulation_steps}"
        " micro-batches: a single outlier can cause an arbitrarily large update. Set 1.0 unless this is intended."
    ]


def collect(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; where it raises UserError its messages are added to `problems`, and None is returned."""
    try:
        return read()
    except UserError as error:
        problems += error.messages
        return None


def plan_batch(loaded: LoadedRecipe, strategy: Strategy) -> tuple[BatchPlan, float]:
    """(batch, max_grad_norm) of a recipe under a launch. Raises UserError where the numbers contradict each other."""
    steps, max_grad_norm = merge_knobs(loaded, strategy)
    training = loaded.recipe.training
    global_batch, per_device = training.global_batch_size, training.per_device_train_batch_size
    row_tokens = loaded.recipe.data.max_length if loaded.recipe.data.packing else None
    batch = derive_batch(global_batch, per_device, steps, strategy.data_ranks, loaded.location, row_tokens)
    return batch, max_grad_norm


def merge_knobs(loaded: LoadedRecipe, strategy: Strategy) -> tuple[int | Literal["auto"], float]:
    """(gradient_accumulation_steps, max_grad_norm) after the one-owner rule.

    The launch configuration fills what the recipe leaves open (`auto`, or a max_grad_norm it does not give). Raises
    UserError naming both values where both give one and they differ.
    """
    training = loaded.recipe.training
    ours = {key: getattr(training, key) for key in ("gradient_accumulation_steps", "max_grad_norm")}
    theirs = {
        "gradient_accumulation_steps": ("gradient_accumulation_steps", strategy.gradient_accumulation_steps),
        "max_grad_norm": ("gradient_clipping", strategy.gradient_clipping),
    }
    problems = []
    for key, (name, value) in theirs.items():
        full = f"training.{key}"
        if value is None:
            continue
        if ours[key] == "auto" or not loaded.is_set(full):
            ours[key] = value
        elif ours[key] != value:
            problems.append(
                f"{loaded.location(full)}: {full} is {ours[key]:g}, but the launch configuration ({strategy.source})"
                f" says {name} {value:g}. The recipe owns it: remove it from the launch configuration, or make them"
                " equal."
            )
    if problems:
        raise UserError(problems)
    return ours["gradient_accumulation_steps"], ours["max_grad_norm"]
