"""Gradient clipping on the CPU; on GPUs native.py calls accelerate, and under ZeRO DeepSpeed clips by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def clip_on_cpu(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to this norm, 0 for no limit; their norm before, a scalar.

    On the CPU torch adds squares up one after the other in float32: 4e-5 off for a million elements, 0.4 % for 67
    million, and so would be the clipped step. Short sums first, then float64."""
    rows = [
        torch.linalg.vector_norm(torch.atleast_1d(p.grad), dim=-1).double().flatten()
        for p in parameters
        if p.grad is not None
    ]
    norm = torch.linalg.vector_norm(torch.cat(rows))
    nn.utils.clip_grads_with_norm_(parameters, limit or math.inf, norm)
    return norm
