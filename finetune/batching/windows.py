"""The arithmetic of accumulation: rows -> windows -> ranks -> micro-batches. Pure, torch-free.

A *window* is what one optimizer step sees: the rows of the global batch, or as many as a schedule says, over all ranks
and micro-batches (the last window of an epoch may hold fewer). The order of the rows is a function of (seed, epoch)
alone and a window takes the next rows of that order, so ranks and micro-batches only slice it: 1 rank x K=8, 2 x 4 and
8 x 1 see the same rows in every window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from finetune.batching.learning_rate import BatchSchedule
from finetune.batching.noise_scale import NoiseState
from finetune.errors import UserError
from finetune.launch import strategy as launch
from finetune.launch.strategy import Strategy
from finetune.recipe.load import Loaded

AUTO = "auto"


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_rows = per_device_rows x accumulation_steps (K) x ranks, all known."""

    global_batch_rows: int
    per_device_rows: int
    accumulation_steps: int
    ranks: int
    # the micro-batch is chosen by memory once the model and the rows are known; until then it is one row
    open: bool = False

    def steps(self, rows: int) -> int:
        """K of a window of `rows` rows."""
        return max(1, math.ceil(rows / (self.per_device_rows * self.ranks)))

    def stages_line(self, schedule: BatchSchedule) -> str:
        """One line for people: rows and K over the run."""
        if schedule.adapts:
            ends = [schedule.rows(0.0, doublings) for doublings in (schedule.least_doublings, schedule.most_doublings)]
            between = " to ".join(f"{rows} rows (K={self.steps(rows)})" for rows in ends)
            return f"then {between} by the gradient noise scale, measured every {schedule.measure_every} windows"
        return ", ".join(
            f"{rows} rows (K={self.steps(rows)}) until {until:.4g} of the run" for until, rows in schedule.stages
        )

    def line(self) -> str:
        """One line for people: the product and its factors."""
        if self.open:
            return (
                f"{self.global_batch_rows} rows per optimizer step over {self.ranks}"
                f" rank{'s' if self.ranks != 1 else ''}; micro-batches (auto) are the largest that fit"
                " training.device_memory"
            )
        return (
            f"{self.global_batch_rows} rows per optimizer step = {self.per_device_rows}"
            f" row{'s' * (self.per_device_rows != 1)} per micro-batch x K={self.accumulation_steps} micro-batches x"
            f" {self.ranks} rank{'s' if self.ranks != 1 else ''}"
        )


@dataclass(frozen=True)
class Window:
    """The rows between two optimizer steps. `rows` are row numbers in training order, `first_row` their position in the
    epoch.
    """

    epoch: int
    index: int
    first_row: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """Where a run is between two windows: all that the next window and its learning rate depend on."""

    step: int = 0  # applied optimizer steps
    window: int = 0  # windows taken; more than steps when some were skipped
    epoch: int = 0
    first_row: int = 0  # rows of the epoch's order that were taken
    applied_rows: int = 0
    skipped_in_a_row: int = 0
    noise: NoiseState = NoiseState()  # what an adaptive batch follows

    def after(self, window: Window, applied: bool, noise: NoiseState | None = None) -> Position:
        """The position behind this window. One that applied nothing has used its rows up, but is no step and no
        progress.
        """
        return Position(
            step=self.step + applied,
            window=window.index + 1,
            epoch=window.epoch,
            first_row=window.first_row + len(window.rows),
            applied_rows=self.applied_rows + len(window.rows) * applied,
            skipped_in_a_row=0 if applied else self.skipped_in_a_row + 1,
            noise=noise or self.noise,
        )


def plan_batch(loaded: Loaded, strategy: Strategy) -> tuple[BatchPlan, float]:
    """Batch arithmetic and max_grad_norm of a recipe under a launch. Raises UserError where they do not fit
    together.
    """
    steps, max_grad_norm = launch.merge_knobs(loaded, strategy)
    training = loaded.recipe.training
    global_batch, per_device = training.global_batch_size, training.per_device_train_batch_size
    return derive_batch(global_batch, per_device, steps, strategy.ranks, loaded.where), max_grad_norm


def derive_batch(global_batch: int | str, per_device: int | str, steps: int | str, ranks: int, where=str) -> BatchPlan:
    """Fill in the one value that is `auto` and check the product.

    `where(key)` names the place of a recipe key for messages. Raises UserError with the arithmetic and the nearest
    fixes."""
    key = "training.global_batch_size"
    if per_device == AUTO and steps == AUTO:
        if global_batch == AUTO:
            raise UserError(
                f"{where(key)}: {key}, per_device_train_batch_size and gradient_accumulation_steps are all auto. Set"
                " one."
            )
        return BatchPlan(global_batch, 1, _quotient(global_batch, 1, ranks, "rows", where), ranks, open=True)
    if global_batch == AUTO:
        if AUTO in (per_device, steps):
            raise UserError(
                f"{where(key)}: {key} is auto, so per_device_train_batch_size and"
                " gradient_accumulation_steps must both be numbers."
            )
        return BatchPlan(per_device * steps * ranks, per_device, steps, ranks)
    if per_device == AUTO:
        return BatchPlan(global_batch, _quotient(global_batch, steps, ranks, "micro-batches", where), steps, ranks)
    if steps == AUTO:
        return BatchPlan(global_batch, per_device, _quotient(global_batch, per_device, ranks, "rows", where), ranks)
    if per_device * steps * ranks != global_batch:
        raise UserError(
            f"{where(key)}: {key} is {global_batch}, but {per_device} rows x {steps} micro-batches x {ranks} ranks ="
            f" {per_device * steps * ranks}. Use global_batch_size {per_device * steps * ranks}, or let one of"
            " per_device_train_batch_size and gradient_accumulation_steps be auto."
        )
    return BatchPlan(global_batch, per_device, steps, ranks)


def _quotient(global_batch: int, factor: int, ranks: int, unit: str, where) -> int:
    unit_rows = factor * ranks
    if global_batch % unit_rows == 0:
        return global_batch // unit_rows
    other = "per_device_train_batch_size" if unit == "rows" else "gradient_accumulation_steps"
    below = global_batch // unit_rows * unit_rows
    fixes = " or ".join(str(n) for n in (below, below + unit_rows) if n > 0)
    divisors = [d for d in range(1, global_batch + 1) if global_batch % (d * ranks) == 0]
    if divisors:
        fixes += f", or {other} {min(divisors, key=lambda d: (abs(d - factor), -d))}"
    key = "training.global_batch_size"
    raise UserError(
        f"{where(key)}: {key} is {global_batch}, but {factor} {unit} x {ranks} ranks = {unit_rows} does not divide it."
        f" Use {fixes}."
    )


@lru_cache(maxsize=2)  # every window of an epoch asks for the same one
def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `rows` rows, int64 (rows,): a function of (seed, epoch) alone.

    Sorted by raw PCG64 words, the part of numpy's generators whose stream is promised to stay the same between
    versions."""
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def epoch_rows(rows: int, epochs: float) -> list[int]:
    """Rows taken in each epoch: all of them, and a share of the last when `epochs` is not whole (at least one row)."""
    return [rows_of_epoch(rows, epochs, epoch) for epoch in range(math.ceil(epochs))]


def rows_of_epoch(rows: int, epochs: float, epoch: int) -> int:
    """Rows taken in epoch number `epoch` of `epochs` (may be infinite); 0 when the run has no such epoch."""
    if epoch + 1 <= epochs:
        return rows
    return max(round((epochs - epoch) * rows), 1) if epoch < epochs else 0


def stream_window(position: Position, batch_rows: int) -> Window:
    """The window at this position of an endless stream, whose rows are numbered by their place in it: training
    order.
    """
    first = position.first_row
    return Window(0, position.window, first, tuple(range(first, first + batch_rows)))


def next_window(position: Position, rows: int, batch_rows: int, seed: int, epochs: float = math.inf) -> Window | None:
    """The window of at most `batch_rows` rows that begins at this position, None behind the last. It never spans two
    epochs.
    """
    epoch, first = position.epoch, position.first_row
    if first >= rows_of_epoch(rows, epochs, epoch):
        epoch, first = epoch + 1, 0
    end = min(first + batch_rows, rows_of_epoch(rows, epochs, epoch))
    if first >= end:
        return None
    return Window(epoch, position.window, first, tuple(row_order(rows, seed, epoch)[first:end].tolist()))


def planned_windows(rows: int, batch: BatchSchedule, epochs: float) -> int:
    """Windows in `epochs` epochs when each is applied, short last windows counted."""
    counts = epoch_rows(rows, epochs)
    if not batch.varies:
        return sum(math.ceil(count / batch.rows(0.0)) for count in counts)
    windows, taken, total = 0, 0, sum(counts)
    for end in itertools.accumulate(counts):
        while taken < end:
            taken = min(taken + batch.rows(taken / total), end)
            windows += 1
    return windows


def largest_micro_batches(
    lengths: np.ndarray, order: np.ndarray, window_rows: int, per_device_rows: int, ranks: int = 1
) -> list[tuple[int, int, bool]]:
    """Of the first micro-batches of all windows, and of the later ones if there are any, the one with the most tokens,
    padding counted: (rows, longest row in tokens, whether rows differ in length).

    `lengths` (rows,) are the tokens of each row; `order` the rows of one epoch, cut into windows of `window_rows` and
    those as `deal` does."""
    offsets = np.arange(0, window_rows, per_device_rows)
    starts = (np.arange(0, len(order), window_rows)[:, None] + offsets).ravel()
    first = np.tile(offsets < ranks * per_device_rows, len(starts) // len(offsets))[starts < len(order)]
    starts = starts[starts < len(order)]
    taken = lengths[order]
    counts = np.diff(starts, append=len(order))
    longest, shortest = np.maximum.reduceat(taken, starts), np.minimum.reduceat(taken, starts)
    size = counts * longest * 2 + (shortest < longest)  # of two with as many tokens the padded one
    largest = [int(np.where(chosen, size, -1).argmax()) for chosen in (first, ~first) if chosen.any()]
    return [(int(counts[k]), int(longest[k]), bool(shortest[k] < longest[k])) for k in largest]


def deal(rows: Sequence[int], ranks: int, per_device_rows: int) -> list[list[tuple[int, ...]]]:
    """Slice a window's rows into `[rank][micro_batch]` tuples of at most `per_device_rows` rows.

    Every rank gets the same number of micro-batches (collectives need it); in a short window some are empty.
    """
    steps = max(1, math.ceil(len(rows) / (per_device_rows * ranks)))
    starts = [[(k * ranks + rank) * per_device_rows for k in range(steps)] for rank in range(ranks)]
    return [[tuple(rows[s : s + per_device_rows]) for s in of_rank] for of_rank in starts]
