"""A micro-batch that was chosen by memory, tried on the device before training: windows of the longest rows, thrown
away.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
from collections.abc import Callable

import numpy as np
import torch

from finetune.engine.devices import device_limit_bytes, empty_cache, has_accelerator
from finetune.engine.memory_use import is_out_of_memory
from finetune.errors import OutOfMemory
from finetune.memory.micro_batch import KEY, next_smaller
from finetune.report.text import human_bytes
from finetune.training.job import JobSpec, assemble
from finetune.training.one_batch_reference import accumulate

# at most: one makes the optimizer's states, the next has them beside its activations; fp16's scaler skips some at first
WINDOWS = 20
TIMEOUT_SECONDS = 60.0  # for the other ranks to come to the trial's end


def try_micro_batch(plan: JobSpec, say: Callable[[str], None]) -> JobSpec:
    """The plan, or the one with the next smaller micro-batch where memory ran out: the same global batch, said in one
    line.

    The model is read for the trial and read again for the run, so that the trial leaves nothing behind. A collective.
    Raises OutOfMemory where the smaller one runs out, too."""
    if plan.loaded.recipe.data.streaming:
        return plan  # its longest rows are not known
    reason = _runs_out_of_memory(plan)
    if not reason:
        return plan
    smaller = next_smaller(plan.batch)
    if smaller is not None:
        less = dataclasses.replace(plan, batch=smaller)
        say(f"auto: {plan.batch.micro_batch_size} per micro-batch run out of memory here ({reason}): {smaller.line()}.")
        if not (again := _runs_out_of_memory(less)):
            return less
        reason = again
    raise OutOfMemory(
        f"{plan.loaded.location('training.device_memory')}: the micro-batch that should fit runs out of memory"
        f" ({reason}), and so does the next smaller one. Set training.device_memory to less than what is there, or"
        " training.per_device_train_batch_size to a number."
    )


def _runs_out_of_memory(plan: JobSpec) -> str:
    """Whether windows of the longest rows run out of memory on any rank, in words; nothing of it is kept."""
    job, reason = assemble(plan, lambda line: None), ""
    try:
        longest = np.argsort(plan.data.train.lengths, kind="stable")[-plan.batch.per_device_rows :].tolist()
        if plan.batch.budget_tokens is not None:  # no longer a row than there is, but as many as there is room for
            longest = _fill(plan.data.train.lengths, plan.batch.budget_tokens)
        batch = job.collate(job.train_rows, tuple(longest))
        stepped = False
        for _ in range(WINDOWS):
            accumulate(job.engine, [batch] * min(2, plan.batch.accumulation_steps))
            if stepped:
                break
            stepped = job.engine.applied
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{human_bytes(device_limit_bytes())} on this device" if has_accelerator() else "out of host memory"
    if job.engine.ranks > 1:
        said = exchange_through_store(f"trial of {plan.batch.micro_batch_size}", reason, TIMEOUT_SECONDS)
        if said is None:  # the others wait in a collective that this rank left: no way on but to end
            raise OutOfMemory(
                f"{plan.loaded.location(KEY)}: {plan.batch.micro_batch_size} per micro-batch, chosen by auto, run"
                f" out of memory on rank {job.engine.rank} alone ({reason or 'another rank'}). Set {KEY} to less than"
                " what is there."
            )
        reason = next(filter(None, said), "")
    job.engine.release()
    del job
    gc.collect()
    empty_cache()
    return reason


def _fill(lengths: np.ndarray, budget_tokens: int) -> list[int]:
    """The longest rows that fill a packed micro-batch, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    return order[np.cumsum(lengths[order]) <= budget_tokens].tolist()


def exchange_through_store(key: str, text: str, timeout_seconds: float) -> list[str] | None:
    """The text of every rank under this key, which is used once; None where a rank writes none in time, because it
    waits in a collective.

    No collective: a rank that left one half-way can still ask.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"{key}/{torch.distributed.get_rank()}", text)
    keys = [f"{key}/{rank}" for rank in range(torch.distributed.get_world_size())]
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_seconds))
    except RuntimeError:  # torch's DistStoreError
        return None
    return [store.get(key).decode() for key in keys]
