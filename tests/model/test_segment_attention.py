"""Attention of packed samples equals that of each sample alone, in values and gradients."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from finetune.model.segment_attention import segment_attention, varlen_attention

LENGTHS = (7, 1, 13, 2, 40)
MODULE = SimpleNamespace(is_causal=True)


def tensors(heads: int, kv_heads: int, dtype: torch.dtype, sizes: tuple[int, int] = (16, 16)) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((heads, sizes[0]), (kv_heads, sizes[0]), (kv_heads, sizes[1]))
    made = [torch.randn(1, sum(LENGTHS), h, d, generator=random, dtype=torch.float64) for h, d in shapes]
    return [t.to(dtype).transpose(1, 2).requires_grad_() for t in made]


def alone(query, key, value, window=None, softcap=None):
    """Each sample by itself, the formula written out."""
    outputs = []
    for q, k, v in zip(*(t.split(LENGTHS, 2) for t in (query, key, value)), strict=True):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        place = torch.arange(q.shape[2])
        seen = place[:, None] >= place[None]
        seen = seen if window is None else seen & (place[:, None] - place[None] < window)
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("window, softcap", [(None, None), (4, None), (None, 5.0), (4, 5.0), (100, None)])
@pytest.mark.parametrize("kv_heads, value_size", [(4, 16), (2, 16), (4, 8)])
def test_values_and_gradients_in_float64(window, softcap, kv_heads, value_size):
    mine, theirs = (tensors(4, kv_heads, torch.float64, (16, value_size)) for _ in range(2))
    found, _ = segment_attention(
        MODULE, *mine, None, scaling=0.3, segment_lengths=LENGTHS, sliding_window=window, softcap=softcap
    )
    wanted = alone(*theirs, window, softcap)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found, generator=None)
    found.backward(upstream)
    wanted.backward(upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_is_bit_for_bit_torchs_own_on_each_sample(dtype):
    mine, theirs = (tensors(4, 2, dtype) for _ in range(2))
    found, _ = segment_attention(MODULE, *mine, None, segment_lengths=LENGTHS)
    parts = zip(*(t.split(LENGTHS, 2) for t in theirs), strict=True)
    one_by_one = [F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True).transpose(1, 2) for p in parts]
    wanted = torch.cat(one_by_one, 1)
    assert torch.equal(found, wanted)
    upstream = torch.ones_like(found)
    found.backward(upstream)
    wanted.backward(upstream)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


def test_autocast_reaches_the_kernel():
    query, key, value = tensors(4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = segment_attention(MODULE, query, key, value, None, segment_lengths=LENGTHS)
    assert found.dtype == torch.bfloat16


def test_without_segments_every_row_of_a_batch_is_one():
    query, key, value = (torch.cat([t, t.flip(2)]) for t in tensors(4, 2, torch.float64))
    found, _ = segment_attention(MODULE, query, key, value, None)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


def test_a_varlen_kernel_hands_float32_on():
    arguments = tensors(4, 2, torch.float32)
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    found, wanted = (
        kernel(MODULE, *arguments, None, segment_lengths=LENGTHS, cu_seq_lens_q=ends)[0]
        for kernel in (varlen_attention, segment_attention)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "module, options, words",
    [
        (MODULE, {"s_aux": torch.ones(4)}, "asks for s_aux"),
        (MODULE, {"position_bias": torch.ones(4)}, "asks for position_bias"),
        (MODULE, {"attention_mask": torch.ones(1)}, "asks for a mask of its own"),
        (MODULE, {"is_causal": False}, "asks for attention that is not causal"),
        (SimpleNamespace(is_causal=False), {}, "asks for attention that is not causal"),
        (MODULE, {"segment_lengths": (3,)}, "not over one packed row"),
    ],
)
def test_what_a_kernel_has_not_it_refuses(module, options, words):
    options = {"attention_mask": None, "segment_lengths": LENGTHS} | options
    with pytest.raises(ValueError, match=words):
        segment_attention(module, *tensors(4, 2, torch.float32), **options)
