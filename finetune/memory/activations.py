"""Activations of a decoder from a few numbers of its config: what is left where a model cannot be traced. Wide ranges.
Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.model.parameters import Weights

LOW, HIGH = (
    0.6,
    1.8,
)  # of the expected value; traced Llama and Qwen3 are within a tenth of it, an unknown architecture need not be
LORA_FACTOR = 17.0 / 11.7  # traced: Llama-2-7B, 1 x 2048, adapters on every linear layer, against full fine-tuning
LOSS_BYTES = 12  # per logit: log-softmax, its gradient and the logits' in float32, all alive when the backward begins


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a config that activations depend on. `gated`: the MLP has a gate (SwiGLU, GeGLU)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True


@dataclass(frozen=True)
class Range:
    """Bytes."""

    low: float
    expected: float
    high: float


def layer_bytes(shape: DecoderShape, tokens: int, compute_bytes: int, autocast: bool = False) -> float:
    """What one layer keeps for its backward, for `tokens` tokens of all rows of a micro-batch.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, equation 1, without the terms in tokens squared, which
    fused attention (sdpa, flash) does not keep, without dropout, with fewer key and value heads and a gated MLP, and
    with what Hugging Face's RMSNorm keeps in float32. Per token: two norms with a float32 copy of their input and the
    normalised value, two outputs of them (under autocast one cast each for q, k, v, gate and up), queries, keys,
    values, the attention's output twice (as heads, as rows) and its float32 log-sums, and of the MLP gate, activation,
    up and product (without a gate: input and output of the activation)."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    residual = 4 if autocast else compute_bytes
    norms = 2 * (4 + residual) * shape.hidden
    inputs = (5 if autocast else 2) * compute_bytes * shape.hidden
    attention = compute_bytes * (3 * queries + 2 * keys) + 4 * shape.heads
    mlp = compute_bytes * (4 if shape.gated else 2) * shape.intermediate
    return float(tokens * (norms + inputs + attention + mlp))


def guess_activations(
    shape: DecoderShape,
    rows: int,
    tokens: int,
    compute_bytes: int,
    checkpointing: bool,
    autocast: bool = False,
    lora: bool = False,
) -> dict[str, dict[str, Range]]:
    """Bytes by item in the two moments of a micro-batch (rows, tokens) of which the larger one is its peak: "loss",
    when the backward begins, and "layer", when that of the last layer does and the logits are gone.

    With checkpointing every layer keeps its input, and one layer at a time is whole again. `autocast`: float32 weights
    in a bf16 or fp16 run without DeepSpeed; `cast_bytes` come on top, without checkpointing until the backward, else
    until the loss. The loss: objectives/sft.py."""
    count = rows * tokens
    one = layer_bytes(shape, count, compute_bytes, autocast) * (LORA_FACTOR if lora else 1.0)
    inputs = float(count * shape.hidden * (4 if autocast else compute_bytes))
    kept = shape.layers * (inputs if checkpointing else one)
    whole = kept + one if checkpointing else kept
    loss = {"activations": _around(kept), "logits and loss": _around(float(LOSS_BYTES * count * shape.vocabulary))}
    return {"loss": loss, "layer": {"activations": _around(whole)}}


def cast_bytes(weights: Weights) -> float:
    """What autocast's 16-bit copies of float32 weights take during a forward (torch 2.13, autocast_mode.cpp, keeps them
    to its end): all that are trained, but of those outside the layers only the largest, which is the head's."""
    layers = sum(w.elements for w in weights.all if w.trained and w.layer is not None)
    return 2.0 * (layers + max((w.elements for w in weights.all if w.trained and w.layer is None), default=0))


def _around(expected: float) -> Range:
    return Range(LOW * expected, expected, HIGH * expected)
