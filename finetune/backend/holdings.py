"""Out of memory: which errors say so, and what this process holds, by actual tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

from finetune.backend.engine import Engine
from finetune.backend.probe import has_accelerator

# torch's on the CPU are plain RuntimeErrors; CUDA's libraries have their own words
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed", "bad_alloc")
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or the host ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def tried_bytes(error: BaseException) -> float:
    """What was asked for when memory ran out, 0 where the error does not say."""
    found = _TRIED.search(str(error))
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def of_the_device(error: BaseException) -> bool:
    """Whether it was the device's memory, and not the host's."""
    return has_accelerator() and not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error)


def device_limit_bytes() -> int:
    """Memory of this process's device."""
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return int(module.mem_get_info()[1])


def holdings(engine: Engine | None, device: bool) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer states and everything else in the device's memory, or the host's.

    Under DeepSpeed the float32 copies that the optimizer updates count as its states, and its gradient buffers as the rest.
    """
    parameters: list[Tensor] = []
    states: list[Tensor] = []
    if engine is not None and hasattr(engine, "optimizer"):
        parameters = list(engine.module.parameters())
        optimizer = engine.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
            optimizer = optimizer.optimizer
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        own = {id(p) for p in parameters}
        states += [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = {name: _bytes(tensors, device) for name, tensors in
             (("parameters", parameters), ("gradients", gradients), ("optimizer states", states))}  # fmt: skip
    used = torch.accelerator.memory_allocated() if device else psutil.Process().memory_info().rss
    return found | {"everything else": max(0, int(used) - sum(found.values()))}


def _bytes(tensors: Iterable[Tensor], device: bool) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if (t.device.type != "cpu") == device}
    return sum(storages.values())
