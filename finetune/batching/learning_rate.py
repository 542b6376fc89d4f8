"""Learning rate and progress as pure functions: nothing is stepped, so nothing can get out of step. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.batching.batch_size import BatchSchedule
from finetune.recipe.fields import TrainingSection

COSINE_FLOOR = 0.1  # cosine_with_min_lr ends at this share of the peak


@dataclass(frozen=True)
class LrScaling:
    """How the learning rate follows the global batch: `none`, `sqrt` or `linear` in batch rows / reference rows."""

    rule: str = "none"
    reference_rows: int | None = None

    def factor(self, batch_rows: int) -> float:
        """What the recipe's learning rate is multiplied with at a global batch of `batch_rows` rows."""
        if self.rule == "none":
            return 1.0
        assert self.reference_rows is not None, "the recipe's rules ask for it with a rule"
        ratio = batch_rows / self.reference_rows
        return math.sqrt(ratio) if self.rule == "sqrt" else ratio

    def line(self, base: float, batch_rows: int) -> str:
        """The arithmetic for people: `learning rate 2e-4 x sqrt(64/16) = 4e-4`."""
        if self.rule == "none":
            return f"learning rate {rate_text(base)}"
        ratio = f"{batch_rows}/{self.reference_rows}"
        factor = f"sqrt({ratio})" if self.rule == "sqrt" else ratio
        return f"learning rate {rate_text(base)} x {factor} = {rate_text(base * self.factor(batch_rows))}"


def lr_scaling(training: TrainingSection) -> LrScaling:
    """The recipe's coupling of learning rate and batch."""
    return LrScaling(training.lr_scaling, training.reference_batch_size)


def rate_text(rate: float) -> str:
    """A learning rate to four digits, small ones as `4e-4`."""
    if rate == 0 or 0.01 <= rate < 1000:
        return f"{rate:.4g}"
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(frozen=True)
class Schedule:
    """When the run ends and what the learning rate is on the way.

    Exactly one of `max_steps` (optimizer steps) and `total_rows` (applied rows) ends the run; `planned_steps` is the
    number of steps either way when no window is skipped. `peak` is the learning rate before scaling. `warmup_share` is
    set where the warm-up goes by progress and not by `warmup_steps`: steps are no measure when the batch varies.
    """

    shape: str
    peak: float
    warmup_steps: int
    planned_steps: int
    max_steps: int | None
    total_rows: int | None
    batch: BatchSchedule
    scaling: LrScaling = LrScaling()
    warmup_share: float | None = None

    def batch_rows(self, step: int, applied_rows: int, doublings: int = 0) -> int:
        """Scheduled rows of the next window; an epoch's last one may hold fewer."""
        return self.batch.rows(self.progress(step, applied_rows), doublings)

    def progress(self, step: int, applied_rows: int) -> float:
        """Share of the run done before this step, in [0, 1]."""
        done, end = self._done_of(step, applied_rows)
        return min(done / end, 1.0)

    def finished(self, step: int, applied_rows: int) -> bool:
        """Whether the run has done all it was asked to do."""
        done, end = self._done_of(step, applied_rows)
        return done >= end

    def _done_of(self, step: int, applied_rows: int) -> tuple[int, int]:
        """(done, end), both in steps or both in rows, whichever ends the run."""
        if self.max_steps is not None:
            return step, self.max_steps
        assert self.total_rows is not None, "steps or rows end a run"
        return applied_rows, self.total_rows

    def learning_rate(self, step: int, applied_rows: int, doublings: int = 0) -> float:
        """Learning rate of optimizer step number `step` (0 for the first).

        `applied_rows` were applied before it; `doublings` says how large an adaptive batch is at this step.
        """
        progress = self.progress(step, applied_rows)
        # the scheduled size: a short window keeps the learning rate of its neighbours
        rows = self.batch.rows(progress, doublings)
        if self.warmup_share is not None:
            warm_share = self.warmup_share
            behind = self.progress(step + 1, applied_rows + rows)
            warm = min(1.0, behind / warm_share) if warm_share else 1.0
        else:
            warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            warm_share = min(1.0, self.warmup_steps / self.planned_steps) if self.planned_steps else 0.0
        after = (progress - warm_share) / (1 - warm_share) if warm_share < 1 else 0.0
        return self.peak * self.scaling.factor(rows) * warm * decay(self.shape, max(after, 0.0))


def decay(shape: str, progress: float) -> float:
    """Factor on the peak learning rate after `progress` (0 to 1) of the decay.

    Raises ValueError for an unknown shape.
    """
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
