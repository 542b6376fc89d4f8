"""The batch as a product: rows per optimizer step = rows per micro-batch x K x ranks. Pure, torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from finetune.batching.batch_size import BatchSchedule
from finetune.batching.layout import split_into_micro_batches
from finetune.batching.packing import pack
from finetune.errors import UserError
from finetune.report.text import count

Auto = Literal["auto"]
AUTO: Final = "auto"


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_rows = per_device_rows x accumulation_steps (K) x ranks, all known.

    Packed, a micro-batch takes rows of `per_device_rows` x `row_tokens` tokens, however many they are, and K differs
    from window to window: `accumulation_steps` is that of a window whose rows all have `row_tokens`.
    """

    global_batch_rows: int
    per_device_rows: int
    accumulation_steps: int
    ranks: int
    # the micro-batch is chosen by memory once the model and the rows are known; until then it is one row
    open: bool = False
    row_tokens: int | None = None  # of the longest row there may be, where rows are packed; None: they are padded

    @property
    def budget_tokens(self) -> int | None:
        """Tokens of a packed micro-batch at most; None where rows are padded."""
        return None if self.row_tokens is None else self.per_device_rows * self.row_tokens

    @property
    def micro_batch_size(self) -> str:
        """What a micro-batch takes at most, in words."""
        budget = self.budget_tokens
        return count(self.per_device_rows, "row") if budget is None else count(budget, "token")

    def deal(
        self, rows: Sequence[int], lengths: Sequence[int], fewest: int = 1, in_order: bool = False
    ) -> list[list[tuple[int, ...]]]:
        """The rows of a window, of `lengths` tokens, as `[rank][micro_batch]` tuples; as many on every rank.

        Packed: over all ranks at least `fewest` micro-batches have rows. Padded: rows of like length share a
        micro-batch, which then pads little. With `in_order` rows are taken as they come, whatever their length.
        """
        if self.budget_tokens is not None:
            return pack(rows, lengths, self.ranks, self.budget_tokens, fewest, in_order)
        if not in_order:
            rows = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i))]
        return split_into_micro_batches(rows, self.ranks, self.per_device_rows)

    @property
    def rows_per_rank(self) -> int:
        """Rows of one rank per optimizer step."""
        return -(-self.global_batch_rows // self.ranks)

    def micro_batches(self) -> list[int]:
        """Rows per micro-batch that divide a rank's rows, smallest first; packed, any number."""
        whole = self.row_tokens is None
        return [rows for rows in range(1, self.rows_per_rank + 1) if not whole or self.rows_per_rank % rows == 0]

    def with_micro_batch(self, rows: int) -> BatchPlan:
        """The same global batch in micro-batches of `rows` rows."""
        return replace(self, per_device_rows=rows, accumulation_steps=-(-self.rows_per_rank // rows), open=False)

    def steps(self, rows: int) -> int:
        """K of a window of `rows` rows, where they are packed at most about."""
        return max(1, math.ceil(rows / (self.per_device_rows * self.ranks)))

    def stages_line(self, schedule: BatchSchedule) -> str:
        """One line for people: rows over the run, and K where rows are padded."""

        def said(rows: int) -> str:
            return count(rows, "row") + (f" (K={self.steps(rows)})" if self.row_tokens is None else "")

        if schedule.adapts:
            ends = [schedule.rows(0.0, doublings) for doublings in (schedule.least_doublings, schedule.most_doublings)]
            between = " to ".join(map(said, ends))
            return f"then {between} by the gradient noise scale, measured every {schedule.measure_every} windows"
        return ", ".join(f"{said(rows)} until {until:.4g} of the run" for until, rows in schedule.stages)

    def line(self) -> str:
        """One line for people: the product and its factors."""
        if self.open:
            return (
                f"{self.global_batch_rows} rows per optimizer step over {count(self.ranks, 'rank')};"
                " micro-batches (auto) are the largest that fit training.device_memory"
            )
        if self.budget_tokens is not None:
            return (
                f"{self.global_batch_rows} rows per optimizer step over {count(self.ranks, 'rank')}, packed into"
                f" micro-batches of at most {self.micro_batch_size}"
            )
        if self.per_device_rows * self.accumulation_steps * self.ranks != self.global_batch_rows:
            return (
                f"{self.global_batch_rows} rows per optimizer step over {count(self.ranks, 'rank')}, in K="
                f"{self.accumulation_steps} micro-batches of at most {self.micro_batch_size}"
            )
        return (
            f"{self.global_batch_rows} rows per optimizer step = {count(self.per_device_rows, 'row')} per micro-batch"
            f" x K={self.accumulation_steps} micro-batches x {count(self.ranks, 'rank')}"
        )


def derive_batch(
    global_batch: int | Auto,
    per_device: int | Auto,
    steps: int | Auto,
    ranks: int,
    where: Callable[[str], str] = str,
    row_tokens: int | None = None,
) -> BatchPlan:
    """Fill in the one value that is `auto` and check the product. With `row_tokens` rows are packed.

    `where(key)` names the place of a recipe key for messages. Raises UserError with the arithmetic and the nearest
    fixes.
    """
    key = "training.global_batch_size"
    if row_tokens is not None:
        assert global_batch != AUTO, "it has a default"
        if steps != AUTO:
            key = "training.gradient_accumulation_steps"
            raise UserError(
                f"{where(key)}: {key} is {steps}, but data.packing is true: rows are packed into micro-batches of"
                " per_device_train_batch_size x data.max_length tokens, and how many that makes differs from window to"
                " window. Leave it auto, also in the launch file, or set data.packing to false."
            )
        plan = BatchPlan(global_batch, 1, -(-global_batch // ranks), ranks, per_device == AUTO, row_tokens)
        return plan if per_device == AUTO else plan.with_micro_batch(per_device)
    if per_device == AUTO and steps == AUTO:
        if global_batch == AUTO:
            raise UserError(
                f"{where(key)}: {key}, per_device_train_batch_size and gradient_accumulation_steps are all auto."
                " Set one."
            )
        return BatchPlan(global_batch, 1, _quotient(global_batch, 1, ranks, "rows", where), ranks, open=True)
    if global_batch == AUTO:
        if per_device == AUTO or steps == AUTO:
            raise UserError(
                f"{where(key)}: {key} is auto, so per_device_train_batch_size and"
                " gradient_accumulation_steps must both be numbers."
            )
        return BatchPlan(per_device * steps * ranks, per_device, steps, ranks)
    if per_device == AUTO:
        assert steps != AUTO, "both are auto: answered above"
        return BatchPlan(global_batch, _quotient(global_batch, steps, ranks, "micro-batches", where), steps, ranks)
    if steps == AUTO:
        return BatchPlan(global_batch, per_device, _quotient(global_batch, per_device, ranks, "rows", where), ranks)
    if per_device * steps * ranks != global_batch:
        raise UserError(
            f"{where(key)}: {key} is {global_batch}, but {per_device} rows x {steps} micro-batches x {ranks} ranks ="
            f" {per_device * steps * ranks}. Use global_batch_size {per_device * steps * ranks}, or let one of"
            " per_device_train_batch_size and gradient_accumulation_steps be auto."
        )
    return BatchPlan(global_batch, per_device, steps, ranks)


def _quotient(global_batch: int, factor: int, ranks: int, unit: str, where: Callable[[str], str]) -> int:
    unit_rows = factor * ranks
    if global_batch % unit_rows == 0:
        return global_batch // unit_rows
    other = "per_device_train_batch_size" if unit == "rows" else "gradient_accumulation_steps"
    below = global_batch // unit_rows * unit_rows
    fixes = " or ".join(str(n) for n in (below, below + unit_rows) if n > 0)
    divisors = [d for d in range(1, global_batch + 1) if global_batch % (d * ranks) == 0]
    if divisors:
        fixes += f", or {other} {min(divisors, key=lambda d: (abs(d - factor), -d))}"
    key = "training.global_batch_size"
    raise UserError(
        f"{where(key)}: {key} is {global_batch}, but {factor} {unit} x {ranks} ranks = {unit_rows} does not divide it."
        f" Use {fixes}."
    )
