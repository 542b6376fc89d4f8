"""Loss spikes: a rule on the last losses that one bad batch does not trip.

A loss is an outlier when it is above median + max(10 sigma, 1 nat) of the windows before it; sigma = 1.4826 x the
median absolute deviation, which is the standard deviation of normally distributed losses (Rousseeuw and Croux 1993) and
does not follow outliers. One outlier is a bad batch; three in a row are a spike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

IN_A_ROW = 3
REMEMBERED = 64  # losses that a window is compared with
MIN_HISTORY = 32  # fewer say nothing about what is usual
SIGMAS, MIN_NATS = 10.0, 1.0


def limit(before: Sequence[float]) -> float:
    """The loss in nats above which the next window is an outlier; infinite after fewer than 32 windows."""
    if len(before) < MIN_HISTORY:
        return math.inf
    middle = median(before)
    sigma = 1.4826 * median(abs(loss - middle) for loss in before)
    return middle + max(SIGMAS * sigma, MIN_NATS)


def remember(losses: tuple[float, ...], loss: float) -> tuple[float, ...]:
    """The losses that the rule needs after this one: those that may be the spike, and those it is compared with."""
    return (*losses, loss)[-(REMEMBERED + IN_A_ROW) :]


def consecutive_outliers(losses: Sequence[float]) -> int:
    """How many of the last windows are outliers against those before them, at most 3: 3 is a spike."""
    for count in range(IN_A_ROW, 0, -1):
        if min(losses[-count:], default=0.0) > limit(losses[:-count]):
            return count
    return 0
