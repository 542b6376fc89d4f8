"""`per_device_train_batch_size: auto`: the largest micro-batch that fits a device, by binary search on traces. K
follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finetune.batching.plan import BatchPlan
from finetune.engine.devices import device_limit_bytes, has_accelerator
from finetune.errors import UserError
from finetune.launch.preflight import Resolved, fewest_rows
from finetune.memory.estimate import HOST_LIBRARIES_BYTES, Estimate, estimate
from finetune.memory.trace import MicroBatchShape
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
    settled: Resolved, facts: ModelFacts, longest_tokens: int, say: Callable[[str], None]
) -> BatchPlan:
    """The batch with the largest micro-batch whose rows of at most `longest_tokens` fit; says what was chosen and what
    did not fit.

    Raises UserError where not one row does.
    """
    loaded, strategy, batch = settled.loaded, settled.strategy, settled.batch
    budget, source = budget_bytes(settled)
    sizes = micro_batches(settled)
    needs: dict[int, float] = {}

    def fits(rows: int) -> bool:
        shape = MicroBatchShape(rows, longest_tokens, padded=rows > 1)
        needs[rows] = needed_bytes(
            estimate(loaded, facts, strategy, shape, batch.rows_per_rank // rows, on_cpu=not has_accelerator())
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
        f"auto: {count(chosen, 'row')} of at most {longest_tokens} tokens per micro-batch take"
        f" {human_bytes(needs[chosen])} of {human_bytes(budget)} ({source}){more}. {result.line()}"
    )
    return result


def next_smaller(batch: BatchPlan) -> BatchPlan | None:
    """The same global batch with the next smaller micro-batch; None below one row."""
    smaller = [rows for rows in batch.micro_batches() if rows < batch.per_device_rows]
    return batch.with_micro_batch(smaller[-1]) if smaller else None
