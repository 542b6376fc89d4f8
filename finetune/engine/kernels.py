"""The one resolver of optional kernels and optimizers: what is fastest here, and one line that says what was picked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

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


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """What transformers reads inside may want a package that is not installed (an attention kernel, what a model's own
    code imports): that is then a ValueError with its advice, like everything else that is wrong with a model.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(" ".join(str(error).split())) from error


def plain_4bit_layers(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers, if there are any, from repacking themselves for inference on a CPU with
    AVX512-BF16.

    The first forward in evaluation mode would round their scales to bf16 for good, and no gradient flows through the
    repacked layer: an evaluation at step 0 would ruin the training after it [bitsandbytes 0.50, Linear4bit.forward].
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
