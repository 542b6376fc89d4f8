"""The one resolver of optional kernels and optimizers: what is fastest here, and one line that says what was picked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.engine.deepspeed import config as ds
from finetune.engine.devices import has_accelerator
from finetune.launch.strategy import Strategy


@dataclass(frozen=True)
class OptimizerSettings:
    """The recipe's optimizer: `kind` is adamw, adamw_8bit, paged_adamw_8bit or sgd; the rest as in torch."""

    kind: str
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


def build_optimizer(groups: list[dict], settings: OptimizerSettings, strategy: Strategy) -> torch.optim.Optimizer:
    """The optimizer for parameter groups (torch's format) under this strategy.

    What excludes each other (8-bit states and optimizer offload) has been refused before:
    finetune/launch/compatibility.py."""
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    common = _adam(settings)
    if settings.kind in ("adamw_8bit", "paged_adamw_8bit"):
        import bitsandbytes

        name = "AdamW8bit" if settings.kind == "adamw_8bit" else "PagedAdamW8bit"
        return getattr(bitsandbytes.optim, name)(groups, **common)
    if strategy.offload_optimizer != "none":
        return ds.cpu_adam(groups, **common)
    return torch_adamw(groups, settings, fused=has_accelerator())


def torch_adamw(groups: list[dict], settings: OptimizerSettings, fused: bool) -> torch.optim.Optimizer:
    """torch's AdamW; `fused` where there is a GPU."""
    return torch.optim.AdamW(groups, **_adam(settings), fused=fused)


def _adam(settings: OptimizerSettings) -> dict:
    return dict(lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """What people call this optimizer, for the printed plan."""
    fused = " (fused)" if getattr(optimizer, "defaults", {}).get("fused") else ""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}{fused}"
