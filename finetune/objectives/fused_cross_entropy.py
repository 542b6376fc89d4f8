"""Output head and summed cross-entropy in one pass over chunks of positions: the logits of all never exist.

The gradient is computed in the forward, where a chunk's logits are at hand (as in Liger Kernel, Hsu et al. 2024,
arXiv:2410.10989): for a sum with the same weight everywhere the backward only multiplies it by one number. In memory a
chunk's logits once, instead of three times all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits of a chunk: 64 MiB in float32


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits are computed at a time."""
    return max(64, CHUNK_ELEMENTS // vocabulary)


def summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats of the head's logits against `targets` (n,), a scalar in float32 (float64 for
    float64 inputs).

    `hidden` (n, size), `weight` (vocabulary, size), `bias` (vocabulary,) or None. Logits are computed in the type of
    the inputs, or autocast's, and added up in float32.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return _SummedCrossEntropy.apply(hidden, weight, bias, targets, torch.is_grad_enabled())


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradients: bool
    ) -> Tensor:
        wanted = [gradients and needed for needed in ctx.needs_input_grad]  # needed, also where nothing is recorded
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        size = chunk_positions(len(weight))
        # one chunk's product has its rounding already; several are added up in float32
        added_in = weight.dtype if len(hidden) <= size else torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=added_in) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and wanted[2] else None
        matrix = weight.to(hidden.dtype)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk, right = hidden[rows], targets[rows, None]
            logits = chunk @ matrix.T
            logits = (logits if bias is None else logits + bias).to(precise)
            log_sums = logits.logsumexp(1, keepdim=True)
            total += (log_sums - logits.gather(1, right)).sum()
            if not any(wanted[:3]):
                continue
            # the gradient by the logits: their softmax, less one at the target
            logits.sub_(log_sums).exp_()
            logits.scatter_add_(1, right, logits.new_full((1, 1), -1.0).expand_as(right))
            gradient = logits.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(gradient, matrix, out=of_hidden[rows])
            if of_weight is not None:
                of_weight += gradient.T @ chunk
            if of_bias is not None:
                of_bias += gradient.sum(0)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if one is None else _multiplied(one, factor).to(kind)
            for one, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return *found, None, None


def _multiplied(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a factor, where it lies. The factor is not rounded to 16 bits: of a whole window's gradient
    that would be off by up to 0.2 %.
    """
    if gradient.element_size() >= 4:
        return gradient.mul_(factor)
    for rows in gradient.split(4096):
        rows.copy_(rows.float() * factor)
    return gradient
