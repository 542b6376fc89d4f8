"""Out of memory in one message: what was asked for, what this process holds, and the smallest change that helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from finetune.engine.devices import device_limit_bytes
from finetune.engine.engine import Engine
from finetune.engine.memory_use import is_out_of_memory, memory_by_category, of_the_device, tried_bytes
from finetune.errors import OutOfMemory
from finetune.process import heartbeat
from finetune.process.host_memory import host_memory
from finetune.report.text import human_bytes
from finetune.training.job import JobSpec

# of the memory: what parameters, gradients and optimizer states take for a smaller micro-batch to be no help
MOSTLY = 0.7


@contextlib.contextmanager
def explained(plan: JobSpec, engine: Engine | None = None) -> Iterator[None]:
    """Raises OutOfMemory with one message where memory runs out within it; `engine` is None while the model is
    loaded.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_message(plan, engine, error)) from error


def _message(plan: JobSpec, engine: Engine | None, error: BaseException) -> str:
    device = of_the_device(error)
    if engine is not None and hasattr(engine, "optimizer"):
        held = memory_by_category(engine.module.parameters(), engine.optimizer, device)
    else:
        held = memory_by_category((), None, device)
    tried = f" allocating {human_bytes(tried_bytes(error))}" if tried_bytes(error) else ""
    limit = device_limit_bytes() if device else host_memory().limit_bytes
    place = str(heartbeat.here()) if heartbeat.here().words else f"{heartbeat.here()}, loading the model"
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in held.items())
    fixed = sum(held.values()) - held["other"]
    return (
        f"{place}: out of {'device' if device else 'host'} memory{tried}. This process holds {parts}; there is"
        f" {human_bytes(limit) if device else host_memory()}. {_change(plan, fixed > MOSTLY * limit or engine is None)}"
    )


def _change(plan: JobSpec, too_large: bool) -> str:
    """The smallest change: fewer rows at a time, then recomputed activations, then less to hold; none changes the
    global batch.
    """
    loaded, batch = plan.loaded, plan.batch
    training = loaded.recipe.training
    rows = batch.per_device_rows
    if rows > 1 and not too_large:
        fewer = max(n for n in range(1, rows) if rows % n == 0)
        steps = batch.accumulation_steps * rows // fewer
        also = (
            ""
            if training.gradient_accumulation_steps == "auto"
            else f" and training.gradient_accumulation_steps to {steps}"
        )
        return (
            f"Set training.per_device_train_batch_size to {fewer}{also}: {fewer} row{'s' * (fewer > 1)} x K={steps} x"
            f" {batch.ranks} rank{'s' * (batch.ranks > 1)} = {fewer * steps * batch.ranks} rows per step as before, the"
            " same update."
        )
    if not training.gradient_checkpointing and not too_large:
        return "Set training.gradient_checkpointing to true: activations are computed again instead of kept."
    changes = []
    if plan.strategy.offload_param == "none":
        changes.append("launch with accelerate_configs/zero3_offload.yaml, which shares and offloads what is held")
    if loaded.recipe.lora is None:
        changes.append("train adapters (a lora section)")
    changes.append(f"lower data.max_length ({loaded.recipe.data.max_length})")
    return f"Change one of: {'; '.join(changes)}."
