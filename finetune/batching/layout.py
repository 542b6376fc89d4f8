"""A window's rows laid out over ranks and micro-batches. Pure, torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def split_into_micro_batches(rows: Sequence[int], ranks: int, per_device_rows: int) -> list[list[tuple[int, ...]]]:
    """Slice a window's rows into `[rank][micro_batch]` tuples of at most `per_device_rows` rows.

    Every rank gets the same number of micro-batches (collectives need it); in a short window some are empty.
    """
    steps = max(1, math.ceil(len(rows) / (per_device_rows * ranks)))
    starts = [[(k * ranks + rank) * per_device_rows for k in range(steps)] for rank in range(ranks)]
    return [[tuple(rows[s : s + per_device_rows]) for s in of_rank] for of_rank in starts]


def largest_micro_batches(
    lengths: np.ndarray, order: np.ndarray, window_rows: int, per_device_rows: int, ranks: int = 1
) -> list[tuple[int, int, bool]]:
    """The micro-batches with the most tokens, padding counted.

    Returns one for the windows' first micro-batches, and one for the later ones where there are any, each as (rows,
    longest row in tokens, whether rows differ in length). `lengths` (rows,) are the tokens of each row; `order` holds
    the rows of one epoch, which are cut into windows of `window_rows` and then as `split_into_micro_batches` does.
    """
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
