"""A window's rows laid out over ranks and micro-batches. Pure, torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence


def split_into_micro_batches(rows: Sequence[int], ranks: int, per_device_rows: int) -> list[list[tuple[int, ...]]]:
    """Slice a window's rows into `[rank][micro_batch]` tuples of at most `per_device_rows` rows.

    Every rank gets the same number of micro-batches (collectives need it); in a short window some are empty.
    """
    steps = max(1, math.ceil(len(rows) / (per_device_rows * ranks)))
    starts = [[(k * ranks + rank) * per_device_rows for k in range(steps)] for rank in range(ranks)]
    return [[tuple(rows[s : s + per_device_rows]) for s in of_rank] for of_rank in starts]
