"""Out of memory in one message: what was asked for, what this process holds, and the smallest change that helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from finetune.engine.devices import device_limit_bytes, has_accelerator
from finetune.engine.engine import Engine
from finetune.engine.memory_use import is_out_of_memory, memory_by_category, of_the_device, tried_bytes
from finetune.errors import OutOfMemory
from finetune.memory.strategies import fewer_activations, less_to_hold
from finetune.process import heartbeat
from finetune.process.host_memory import host_memory
from finetune.report.text import human_bytes
from finetune.training.forecast import resolved_of
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
    place = (
        str(heartbeat.own_status())
        if heartbeat.own_status().activity
        else f"{heartbeat.own_status()}, loading the model"
    )
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in held.items())
    fixed = sum(held.values()) - held["other"]
    return (
        f"{place}: out of {'device' if device else 'host'} memory{tried}. This process holds {parts}; there is"
        f" {human_bytes(limit) if device else host_memory()}."
        f" {_change(plan, device, mostly_held=engine is None or fixed > MOSTLY * limit)}"
    )


def _change(plan: JobSpec, device: bool, mostly_held: bool) -> str:
    """The smallest change that helps, in the order of the mitigations; none changes the global batch."""
    resolved = resolved_of(plan, on_cpu=not has_accelerator())
    if not mostly_held and (device or resolved.strategy.use_cpu) and (first := fewer_activations(resolved)):
        return f"{first[0].upper()}{first[1:]}."
    changes = [*less_to_hold(resolved, not device), f"lower data.max_length ({plan.loaded.recipe.data.max_length})"]
    return f"Change one of: {'; '.join(changes)}."
