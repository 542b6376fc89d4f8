"""`per_device_train_batch_size: auto`: the largest micro-batch that fits a device, by binary search on traces. K
follows from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from finetune.batching.plan import BatchPlan
from finetune.data.prepare import PreparedData
from finetune.data.token_cache import TokenRows
from finetune.engine.devices import device_limit_bytes, has_accelerator
from finetune.errors import UserError
from finetune.launch.preflight import Resolved, fewest_rows
from finetune.memory.estimate import HOST_LIBRARIES_BYTES, Estimate, estimate
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.model.facts import ModelFacts
from finetune.process.host_memory import host_memory
from finetune.recipe.sizes import parse_bytes
from finetune.report.text import count, human_bytes

DEVICE_MARGIN, HOST_MARGIN = 0.05, 0.15  # of what the machine has, left free when training.device_memory is auto
KEY = "training.device_memory"


def budget_bytes(settled: Resolved) -> tuple[float, str]:
    """What a rank's step may take, and who says so. On a CPU-only run of the tensors alone, on a device with the
    driver's share.
    """
    said = settled.loaded.recipe.training.device_memory
    if said != "auto":
        return float(parse_bytes(said)), f"{KEY} {said}"
    if has_accelerator():
        limit = device_limit_bytes()
        return limit * (1 - DEVICE_MARGIN), f"this device's {human_bytes(limit)} less {DEVICE_MARGIN:.0%}"
    memory, local = host_memory(), settled.strategy.local_ranks
    share = memory.limit_bytes * (1 - HOST_MARGIN) / local - HOST_LIBRARIES_BYTES
    return share, f"a rank's share of {memory} less {HOST_MARGIN:.0%} and the libraries"


def needed_bytes(found: Estimate) -> float:
    """What is held against the budget: on the CPU the most that tensors may take, exact for one process."""
    return found.host.high / found.host.expected * found.step_bytes if found.on_cpu else found.device_needed.expected


def micro_batches(settled: Resolved) -> list[int]:
    """Rows per micro-batch that divide the global batch of this many ranks, smallest first."""
    return [rows for rows in settled.batch.micro_batches() if rows < fewest_rows(settled)]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of these micro-batches that fits, smallest first; 0 where none does. Asks for about log2 of them."""
    # the whole batch is alone in having no gradients beside its activations: asked by itself
    if len(sizes) and fits(sizes[-1]):
        return sizes[-1]
    low, high = -1, len(sizes) - 1  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else 0


def choose_micro_batch(
    settled: Resolved, facts: ModelFacts, data: PreparedData, say: Callable[[str], None]
) -> BatchPlan:
    """The batch with the largest micro-batch of these rows that fits; says what was chosen and what did not fit.

    Packed, it is a number of tokens: a multiple of the longest row. Raises UserError where not one row fits.
    """
    loaded, strategy, batch = settled.loaded, settled.strategy, settled.batch
    # rows held out come in micro-batches of the same size, and may be longer
    held = [rows for rows in (data.train, data.evaluation) if rows is not None]
    longest_tokens = max(int(rows.lengths.max()) for rows in held)
    if batch.row_tokens is not None:
        batch = dataclasses.replace(batch, row_tokens=longest_tokens)
    budget, source = budget_bytes(settled)
    sizes = micro_batches(settled)
    needs: dict[int, float] = {}
    # an adaptive batch grows, and where it is measured it has two micro-batches: one meets gradients
    least = 2 if loaded.recipe.accumulation.schedule == "adaptive" else 1

    def fits(rows: int) -> bool:
        trained = None if loaded.recipe.data.streaming else most_trained(held, rows, longest_tokens, batch)
        shape = MicroBatchShape(rows, longest_tokens, trained)
        needs[rows] = needed_bytes(
            estimate(loaded, facts, strategy, shape, max(least, -(-batch.rows_per_rank // rows)), not has_accelerator())
        )
        return needs[rows] <= budget

    chosen = largest_that_fits(sizes, fits)
    if not chosen:
        raise UserError(
            f"{loaded.location(KEY)}: not one row of {longest_tokens} tokens fits: it takes"
            f" {human_bytes(needs[sizes[0]])}, and there is {human_bytes(budget)} ({source}). `finetune plan` says what"
            " would fit."
        )
    result = batch.with_micro_batch(chosen)
    larger = next((n for n in sizes if n > chosen), None)
    if larger is not None and larger not in needs:
        fits(larger)
    more = f"; {larger} would take {human_bytes(needs[larger])}" if larger else ""
    say(
        f"auto: {_said(result, chosen, longest_tokens)} per micro-batch take"
        f" {human_bytes(needs[chosen])} of {human_bytes(budget)} ({source}){more}. {result.line()}"
    )
    return result


def _said(batch: BatchPlan, rows: int, longest_tokens: int) -> str:
    if batch.budget_tokens is not None:
        return f"{count(batch.budget_tokens, 'token')}, {count(rows, 'row')} of the longest,"
    return f"{count(rows, 'row')} of at most {longest_tokens} tokens"


def most_trained(held: Sequence[TokenRows], rows: int, longest_tokens: int, batch: BatchPlan) -> int:
    """The most trained tokens that a micro-batch of so many rows, packed of as many tokens, can have."""
    most = 0
    for source in held:
        if batch.row_tokens is None:
            found = int(np.sort(source.trained)[-rows:].sum())
        else:  # those rows first of which the largest share is trained, and of the row that is cut its share
            order = np.argsort(-source.trained / source.lengths, kind="stable")
            tokens, trained = (np.cumsum(values[order]) for values in (source.lengths, source.trained))
            found = math.ceil(np.interp(rows * longest_tokens, [0, *tokens], [0, *trained]))
        most = max(most, found)
    return min(most, rows * longest_tokens)


def next_smaller(batch: BatchPlan) -> BatchPlan | None:
    """The same global batch with the next smaller micro-batch, packed with half of it; None below one row."""
    if batch.row_tokens is not None:
        return batch.with_micro_batch(batch.per_device_rows // 2) if batch.per_device_rows > 1 else None
    smaller = [rows for rows in batch.micro_batches() if rows < batch.per_device_rows]
    return batch.with_micro_batch(smaller[-1]) if smaller else None
