"""Rows per optimizer step over the run: constant, growing in stages, or adaptive. Pure, torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.recipe.fields import AccumulationSection


@dataclass(frozen=True)
class BatchSchedule:
    """Rows per optimizer step over the run.

    `stages` are pairs `(until, rows)`, each valid until that share of the run; the last `until` is 1.
    """

    stages: tuple[tuple[float, int], ...]
    least_doublings: int = 0  # of the adaptive batch: between these it follows the gradient noise scale
    most_doublings: int = 0
    measure_every: int = 1  # windows between two measurements of the noise

    def rows(self, progress: float, doublings: int = 0) -> int:
        """Scheduled rows of one optimizer step.

        `progress` is the share of the run done before this step; an adaptive batch has been doubled `doublings` times.
        """
        rows = next((rows for until, rows in self.stages if progress < until), self.stages[-1][1])
        return max(1, round(rows * 2.0**doublings))

    @property
    def adapts(self) -> bool:
        """Whether the batch follows the gradient noise scale."""
        return self.least_doublings < self.most_doublings

    @property
    def largest_rows(self) -> int:
        """Rows of the largest step that can come."""
        return max(self.rows(until - 1e-9, self.most_doublings) for until, _ in self.stages)

    @property
    def varies(self) -> bool:
        """Whether the stages differ in their rows."""
        return len({rows for _, rows in self.stages}) > 1


def batch_schedule(accumulation: AccumulationSection, global_batch_rows: int, epochs: float | None) -> BatchSchedule:
    """The recipe's schedule in rows; `epochs` is None where steps end the run.

    A function of the global batch and not of ranks or micro-batches, so that a run is the same on any number of ranks.
    """
    if accumulation.schedule == "adaptive":
        # sizes are the global batch times a power of two, so that few of them come and each is met again
        least, most = math.ceil(math.log2(accumulation.smallest)), math.floor(math.log2(accumulation.largest))
        return BatchSchedule(((1.0, global_batch_rows),), least, most, accumulation.measure_every)
    stages = [(1.0, 1.0)]  # (until, share of the global batch)
    if accumulation.schedule == "warmup" and accumulation.by_epoch:
        assert epochs is not None, "the recipe's rules refuse one K per epoch where steps end the run"
        taken = accumulation.steps_by_epoch[: math.ceil(epochs)]
        most = max(accumulation.steps_by_epoch)
        stages = [(n / epochs, steps / most) for n, steps in enumerate(taken, start=1)]
        stages[-1] = (1.0, stages[-1][1])
    elif accumulation.schedule == "warmup":
        stages = accumulation.shares
    return BatchSchedule(tuple((until, max(1, round(share * global_batch_rows))) for until, share in stages))
