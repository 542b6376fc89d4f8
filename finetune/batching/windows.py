"""The windows of a run: which rows each optimizer step takes. Pure, torch-free.

A *window* is what one optimizer step sees: the rows of the global batch, or as many as a schedule says, over all ranks
and micro-batches (the last window of an epoch may hold fewer). The order of the rows is a function of (seed, epoch)
alone and a window takes the next rows of that order, so ranks and micro-batches only slice it: 1 rank x K=8, 2 x 4 and
8 x 1 see the same rows in every window.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from finetune.batching.batch_size import BatchSchedule
from finetune.batching.noise_scale import NoiseState


@dataclass(frozen=True)
class Window:
    """The rows between two optimizer steps.

    `rows` are row numbers in training order, `first_row` is the position of the first of them in the epoch.
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
        """The position behind this window.

        A window that applied nothing has used its rows up, but counts as no step and as no progress.
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


@lru_cache(maxsize=2)  # every window of an epoch asks for the same one
def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `rows` rows, int64 (rows,): a function of (seed, epoch) alone.

    Sorted by raw PCG64 words, the part of numpy's generators whose stream is promised to stay the same between
    versions.
    """
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
    """The window at this position of an endless stream, whose rows are numbered in training order."""
    first = position.first_row
    return Window(0, position.window, first, tuple(range(first, first + batch_rows)))


def next_window(position: Position, rows: int, batch_rows: int, seed: int, epochs: float = math.inf) -> Window | None:
    """The window of at most `batch_rows` rows that begins at this position, None behind the last.

    It never spans two epochs.
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
