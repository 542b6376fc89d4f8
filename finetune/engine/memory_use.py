"""Out of memory: which errors say so, and what this process's memory is used for, by actual tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from finetune.engine.devices import has_accelerator, host_bytes

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


def memory_by_category(
    parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer | None, device: bool
) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer states and all other things in the device's memory, or the host's.

    Under DeepSpeed the float32 copies that the optimizer updates count as its states, and its gradient buffers as the
    rest."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = held_by_optimizer(parameters, optimizer) if optimizer is not None else []
    found = {
        name: _bytes(tensors, device)
        for name, tensors in (("parameters", parameters), ("gradients", gradients), ("optimizer states", states))
    }
    used = torch.accelerator.memory_allocated() if device else host_bytes()
    return found | {"other": max(0, int(used) - sum(found.values()))}


def held_by_optimizer(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer keeps from step to step: its states, and parameters of its own (DeepSpeed's float32
    copies).
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    own = {id(p) for p in parameters}
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return states + [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]


def _bytes(tensors: Iterable[Tensor], device: bool) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if (t.device.type != "cpu") == device
    }
    return sum(storages.values())
