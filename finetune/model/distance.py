"""How far two sets of tensors are apart, computed in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def relative(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Relative L2 difference of two sets of tensors; infinite where anything differs from zeros."""
    difference, size = norm(change(wanted, found)), norm(wanted)
    return difference / size if size else math.inf if difference else 0.0


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over a set of tensors."""
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


def change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """after - before, by name, in float64."""
    return {n: after[n].double() - before[n].double() for n in before}
