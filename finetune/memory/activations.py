"""Activations and losses by formula: what is left where a model cannot be traced. Wide ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import UserError, reason
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.trace import Precision, Profile
from finetune.model.facts import ModelFacts
from finetune.model.outline import outline, weights_of_outline
from finetune.model.parameters import DTYPE_BYTES, Weights
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of the expected value. Traced Llama and Qwen3 are within a tenth of it, an unknown architecture need not be.
LOW, HIGH = 0.6, 1.8
LORA_FACTOR = 17.0 / 11.7  # traced: Llama-2-7B, 1 x 2048, adapters on every linear layer, against full fine-tuning
LOSS_BYTES = 12  # per logit: log-softmax, its gradient and the logits' in float32, all alive when the backward begins


@dataclass(frozen=True)
class DecoderSize:
    """The numbers of a config that activations depend on. The MLP is taken to have a gate (SwiGLU, GeGLU)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


def layer_bytes(size: DecoderSize, tokens: int, compute_bytes: int, autocast: bool = False) -> float:
    """What one layer keeps for its backward, for `tokens` tokens of all rows of a micro-batch.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, equation 1, without the terms in tokens squared, which
    fused attention (sdpa, flash) does not keep, without dropout, with fewer key and value heads and a gated MLP, and
    with what Hugging Face's RMSNorm keeps in float32. Per token: two norms with a float32 copy of their input and the
    normalised value, two outputs of them (under autocast one cast each for q, k, v, gate and up), queries, keys,
    values, the attention's output twice (as heads, as rows) and its float32 log-sums, and of the MLP gate, activation,
    up and product."""
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    residual = 4 if autocast else compute_bytes
    norms = 2 * (4 + residual) * size.hidden
    inputs = (5 if autocast else 2) * compute_bytes * size.hidden
    attention = compute_bytes * (3 * queries + 2 * keys) + 4 * size.heads
    return float(tokens * (norms + inputs + attention + compute_bytes * 4 * size.intermediate))


def activation_bytes(
    size: DecoderSize,
    positions: int,
    predicting: int,
    compute_bytes: int,
    checkpointing: bool,
    autocast: bool = False,
    lora: bool = False,
) -> dict[str, dict[str, float]]:
    """Bytes by item in the two moments of a micro-batch of which the larger one is its peak: "loss", when the backward
    begins, and "layer", when that of the last layer does and the logits are gone. `predicting` positions have logits.

    With checkpointing every layer keeps its input, and one layer at a time is whole again. `autocast`: float32 weights
    in a bf16 or fp16 run without DeepSpeed; `cast_bytes` come on top, without checkpointing until the backward, else
    until the loss. The loss: objectives/sft.py."""
    one = layer_bytes(size, positions, compute_bytes, autocast) * (LORA_FACTOR if lora else 1.0)
    inputs = float(positions * size.hidden * (4 if autocast else compute_bytes))
    kept = size.layers * (inputs if checkpointing else one)
    loss = {"activations": kept, "logits and loss": float(LOSS_BYTES * predicting * size.vocabulary)}
    return {"loss": loss, "layer": {"activations": kept + one if checkpointing else kept}}


def cast_bytes(weights: Weights) -> float:
    """What autocast's 16-bit copies of float32 weights take during a forward (torch 2.13, autocast_mode.cpp, keeps them
    to its end): all that are trained, but of those outside the layers only the largest, which is the head's."""
    layers = sum(w.elements for w in weights.all if w.trained and w.layer is not None)
    return 2.0 * (layers + max((w.elements for w in weights.all if w.trained and w.layer is None), default=0))


def profile_by_formula(
    loaded: LoadedRecipe, facts: ModelFacts, shape: MicroBatchShape, precision: Precision
) -> Profile:
    """What `trace.profile` would say, by formula. Raises UserError where not even the model's outline can be built."""
    key = "model.name_or_path"
    try:
        network = outline(loaded, facts)
        weights = weights_of_outline(network, loaded)
        size = _decoder_size(network.config.get_text_config(), facts)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{loaded.location(key)}: {key} is {loaded.recipe.model.name_or_path}, whose memory cannot be estimated:"
            f" {facts.architecture} cannot be built from its config without weights ({reason(error)}). Give a model of"
            " a class that transformers has."
        ) from error
    lora, checkpointing = loaded.recipe.lora is not None, loaded.recipe.training.gradient_checkpointing
    compute = 2 if precision.mixed_precision != "no" else DTYPE_BYTES[facts.export_dtype] if lora else 4
    found = activation_bytes(size, shape.positions, shape.predicting, compute, checkpointing, precision.autocast, lora)
    casts = cast_bytes(weights) if precision.autocast else 0.0
    found["loss"]["activations"] += casts
    found["layer"]["activations"] += 0.0 if checkpointing else casts
    loss, layer = ({item: round(amount) for item, amount in found[part].items()} for part in ("loss", "layer"))
    forward = {"activations": loss["activations"]}
    return Profile({"forward": [forward], "loss": [loss], "backward": [layer], "optimizer step": [{}]}, weights)


def _decoder_size(config: PretrainedConfig, facts: ModelFacts) -> DecoderSize:
    """A text config's numbers; of a mixture of experts, as many of them as a token passes through."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return DecoderSize(
        hidden=hidden,
        intermediate=width * experts,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=facts.vocabulary,
    )
