"""Parameters and gradients that DeepSpeed keeps in partitions and buffers of its own."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn


def full_parameter(parameter: nn.Parameter, keep: bool) -> Tensor | None:
    """The whole parameter on the CPU, its float32 master where one exists. A collective: every rank calls it.

    Returns None where `keep` is false, so that only one rank pays for the copy.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        value = safe_get_full_fp32_param(parameter)
        return value.detach().to("cpu", copy=True) if keep and value is not None else None
    gather = zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext()
    with gather:
        return parameter.detach().to("cpu", copy=True) if keep else None


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Clear what a skipped step leaves behind.

    DeepSpeed 0.19.8 empties its gradient buffers after a step, and after a skipped one all but those of ZeRO-1 and 2
    with CPU offload and a float32 buffer: one window that is not finite would spoil every later one."""
    if getattr(optimizer, "cpu_offload", False) and isinstance(
        gradients := getattr(optimizer, "averaged_gradients", None), dict
    ):
        gradients.update(dict.fromkeys(gradients))
