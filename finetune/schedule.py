"""Learning rate and progress as pure functions: nothing is stepped, so nothing can get out of step. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

COSINE_FLOOR = 0.1  # cosine_with_min_lr ends at this share of the peak


@dataclass(frozen=True)
class Schedule:
    """When the run ends and what the learning rate is on the way.

    Exactly one of `max_steps` (optimizer steps) and `total_rows` (applied rows) ends the run; `planned_steps` is the number of
    steps either way when no window is skipped.
    """

    shape: str
    peak: float
    warmup_steps: int
    planned_steps: int
    max_steps: int | None
    total_rows: int | None

    def progress(self, step: int, applied_rows: int) -> float:
        """Share of the run done before this step, in [0, 1]."""
        done = step / self.max_steps if self.max_steps is not None else applied_rows / self.total_rows
        return min(done, 1.0)

    def finished(self, step: int, applied_rows: int) -> bool:
        """Whether the run has done all it was asked to do."""
        return step >= self.max_steps if self.max_steps is not None else applied_rows >= self.total_rows

    def learning_rate(self, step: int, applied_rows: int) -> float:
        """Learning rate of optimizer step number `step` (0 for the first), before which `applied_rows` rows were applied."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        warm_share = min(1.0, self.warmup_steps / self.planned_steps) if self.planned_steps else 0.0
        progress = self.progress(step, applied_rows)
        after = (progress - warm_share) / (1 - warm_share) if warm_share < 1 else 0.0
        return self.peak * warm * decay(self.shape, max(after, 0.0))


def decay(shape: str, progress: float) -> float:
    """Factor on the peak learning rate after `progress` (0 to 1) of the decay. Raises ValueError for an unknown shape."""
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "cosine_with_min_lr":
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown learning rate shape {shape!r}")


def warmup_steps_of(ratio: float | None, steps: int | None, planned_steps: int) -> int:
    """warmup_steps as given, else ceil(ratio x planned steps)."""
    return steps if steps is not None else math.ceil((ratio or 0.0) * planned_steps)
