"""When a loss has left the others: a rule on the last losses that one bad batch does not trip.

A window is far out when its loss is above median + max(10 sigma, 1 nat) of the windows before it; sigma = 1.4826 x the
median absolute deviation, which is the standard deviation of normally distributed losses (Rousseeuw and Croux 1993) and
does not follow outliers. One window far out is a bad row; three in a row are a run that has gone astray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

IN_A_ROW = 3
REMEMBERED = 64  # losses that a window is compared with
LEAST = 32  # fewer say nothing about what is usual
SIGMAS, LEAST_NATS = 10.0, 1.0


def limit(before: Sequence[float]) -> float:
    """The loss in nats above which the next window is far out; infinite after fewer than 32 windows."""
    if len(before) < LEAST:
        return math.inf
    middle = median(before)
    sigma = 1.4826 * median(abs(loss - middle) for loss in before)
    return middle + max(SIGMAS * sigma, LEAST_NATS)


def remember(losses: tuple[float, ...], loss: float) -> tuple[float, ...]:
    """The losses that the rule needs after this one: those that may be the spike, and those it is compared with."""
    return (*losses, loss)[-(REMEMBERED + IN_A_ROW) :]


def far_out(losses: Sequence[float]) -> int:
    """How many of the last windows are far out against those before them, at most 3: 3 is a spike."""
    for count in range(IN_A_ROW, 0, -1):
        if min(losses[-count:], default=0.0) > limit(losses[:-count]):
            return count
    return 0
