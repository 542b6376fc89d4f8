"""Causal attention of packed samples: each sees itself alone. Kernels, registered with transformers by name.

A packed row goes through the model's own attention layers, which hand `segment_lengths` or cumulative lengths on to
the kernel; no mask is ever made. The kernels know what a layer asks for (a sliding window, soft-capped scores, grouped
heads) or refuse it. Whether a model's layers reach them as they should is proved at every start: proofs.py."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEGMENTS, VARLEN = "finetune_segments", "finetune_varlen"
_MASKED = -math.inf
_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def register() -> None:
    """Make the kernels known to transformers, which then makes no mask for them. Again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, kernel in ((SEGMENTS, segment_attention), (VARLEN, varlen_attention)):
        AttentionInterface.register(name, kernel)
        AttentionMaskInterface.register(name, no_mask)


def has_varlen() -> bool:
    """Whether this torch's varlen kernel has sliding windows and grouped heads."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of a packed row: none, isolation is the kernel's."""


@contextlib.contextmanager
def no_search_for_packing() -> Iterator[None]:
    """While active, transformers does not look into the positions for packed rows: padded rows are none, and these
    kernels know theirs. The look would make a GPU wait for its answer in every micro-batch.
    """
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Any device and type: torch's scaled_dot_product_attention (sdpa) segment by segment.

    `query` (1, heads, tokens, size), `key` and `value` (1, kv_heads, tokens, size); returns (1, tokens, heads, size).
    Without `segment_lengths` every row of a batch is a segment, padded on the right. Raises ValueError where the layer
    asks for what this kernel has not.
    """
    _refuse_unknown(module, query, key, attention_mask, segment_lengths, kwargs)
    if segment_lengths is None:
        output = _one_segment(query, key, value, dropout, scaling, sliding_window, softcap)
        return output.transpose(1, 2).contiguous(), None
    windowed = sliding_window is not None and max(segment_lengths) > sliding_window
    alike = query.shape[-1] == key.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and alike and not (dropout or windowed or softcap is not None):
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in _autocast(query, key, value))
        return _CausalSegments.apply(query, key, value, tuple(segment_lengths), scaling), None
    parts = [tensor.split(list(segment_lengths), dim=2) for tensor in (query, key, value)]
    outputs = [_one_segment(q, k, v, dropout, scaling, sliding_window, softcap) for q, k, v in zip(*parts, strict=True)]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """What autocast does to the arguments of scaled_dot_product_attention."""
    kind = tensors[0].device.type
    return [t.to(torch.get_autocast_dtype(kind)) for t in tensors] if torch.is_autocast_enabled(kind) else tensors


class _CausalSegments(torch.autograd.Function):
    """sdpa's fused CPU kernel on each segment, with one output for all: nothing is kept twice for the backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segment_lengths: tuple[int, ...], scaling: float | None
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        sums, ends = [], tuple(itertools.accumulate(segment_lengths))
        for start, end in zip((0, *ends), ends, strict=False):
            one, log_sums = _KERNEL(*(t[:, :, start:end] for t in (query, key, value)), 0.0, True, scale=scaling)
            output[:, start:end] = one.transpose(1, 2)
            sums.append(log_sums)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.ends, ctx.scaling = ends, scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        found = [torch.empty_like(t) for t in (query, key, value)]
        for start, end, log_sums in zip((0, *ctx.ends), ctx.ends, sums, strict=False):
            rows = slice(start, end)
            one = _KERNEL_BACKWARD(
                gradient[:, rows].transpose(1, 2),
                *(t[:, :, rows] for t in (query, key, value)),
                output[:, rows].transpose(1, 2),
                log_sums,
                0.0,
                True,
                scale=ctx.scaling,
            )
            for whole, part in zip(found, one, strict=True):
                whole[:, :, rows] = part
        return *found, None, None


def _one_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    tokens, grouped = query.shape[2], query.shape[1] != key.shape[1]
    windowed = sliding_window is not None and tokens > sliding_window
    if softcap is None and not windowed:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    visible = _visible(tokens, sliding_window if windowed else None, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~visible, _MASKED)
    weights = F.dropout(
        scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype), dropout
    )
    return weights @ value


def _visible(tokens: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """(tokens, tokens): whether a query (row) may look at a key (column)."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return visible if sliding_window is None else visible.triu(1 - sliding_window)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """CUDA, 16 bits: torch.nn.attention.varlen, one kernel for all segments.

    `cu_seq_lens_q` (segments + 1,) int32 are their cumulative lengths on the device. Shapes as in `segment_attention`,
    which takes over where the kernel has not what the layer asks for.
    """
    query, key, value = _autocast(query, key, value)  # rotary embeddings leave two of them in float32
    size = query.shape[-1]
    fits = size == value.shape[-1] and size % 8 == 0 and size <= 256 and query.dtype in (torch.float16, torch.bfloat16)
    if dropout or softcap is not None or not fits or cu_seq_lens_q is None or not segment_lengths:
        return segment_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            segment_lengths=segment_lengths,
            sliding_window=sliding_window,
            softcap=softcap,
            **kwargs,
        )
    _refuse_unknown(module, query, key, attention_mask, segment_lengths, kwargs)
    from torch.nn.attention.varlen import varlen_attn

    longest = max(segment_lengths)
    left = -1 if sliding_window is None else sliding_window - 1  # the query itself is one of the window
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[None], None


def _refuse_unknown(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    segment_lengths: Sequence[int] | None,
    kwargs: dict[str, Any],
) -> None:
    """Raises ValueError where a layer wants more than the arguments that a kernel names."""
    asked = [name for name in ("position_bias", "s_aux") if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal")
    if attention_mask is not None:
        asked.append("a mask of its own")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        asked.append("attention that is not causal")
    if asked:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(asked)}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{type(module).__name__} keeps keys of earlier tokens")
    if segment_lengths is not None and (query.shape[0] != 1 or query.shape[2] != sum(segment_lengths)):
        raise ValueError(f"{type(module).__name__} attends over {tuple(query.shape)}, not over one packed row")
