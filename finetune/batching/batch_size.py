"""Rows per optimizer step over the run: constant, growing in stages, or adaptive. Pure, torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.recipe.fields import AccumulationSection


@dataclass(frozen=True)
class BatchSchedule:
    """Rows per optimizer step over the run: `(until, rows)` stages, each until that share of the run, the last until
    1.
    """

    stages: tuple[tuple[float, int], ...]
    least_doublings: int = 0  # of the adaptive batch: between these it follows the gradient noise scale
    most_doublings: int = 0
    measure_every: int = 1  # windows between two measurements of the noise

    def rows(self, progress: float, doublings: int = 0) -> int:
        """Scheduled rows of the step before which `progress` of the run is done, at so many doublings of an adaptive
        batch.
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
        return len({rows for _, rows in self.stages}) > 1


def batch_schedule(accumulation: AccumulationSection, global_batch_rows: int, epochs: float | None) -> BatchSchedule:
    """The recipe's schedule in rows; `epochs` is None where steps end the run.

    A function of the global batch and not of ranks or micro-batches, so that a run is the same on any number of ranks.
    """
    if accumulation.schedule == "adaptive":
        # sizes are the global batch times a power of two, so that few of them come and each is met again
        least, most = math.ceil(math.log2(accumulation.smallest)), math.floor(math.log2(accumulation.largest))
        return BatchSchedule(((1.0, global_batch_rows),), least, most, accumulation.measure_every)
    stages = accumulation.warmup if accumulation.schedule == "warmup" else [[1.0, 1.0]]
    if accumulation.schedule == "warmup" and accumulation.by_epoch:
        taken = accumulation.warmup[: math.ceil(epochs)]
        stages = [(n / epochs, steps / max(accumulation.warmup)) for n, steps in enumerate(taken, start=1)]
        stages[-1] = (1.0, stages[-1][1])
    return BatchSchedule(tuple((until, max(1, round(share * global_batch_rows))) for until, share in stages))
