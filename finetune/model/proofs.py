"""Proofs at every start, on a tiny model of the recipe's class: packed samples do not see each other, and a head that
computes the loss itself computes this model's loss.

Two periods of the model's own layers at a tiny width, with random weights and windows of a few tokens. The logits of a
packed row must be those of each sample alone through the model's usual attention: that also finds a window that got
lost, which changing one sample and looking at the others would not."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.collate import packed, padded
from finetune.data.token_cache import IGNORED, TokenRow
from finetune.errors import reason
from finetune.launch.compatibility import FLASH
from finetune.launch.strategy import Strategy
from finetune.model import segment_attention
from finetune.model.facts import ModelFacts, optional_packages
from finetune.model.outline import repeats, shorten
from finetune.model.shrink import shrunk_config
from finetune.objectives.sft import fused_sft_loss, sft_loss
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 1e-4  # relative L2 in float32; what is right differs by 1e-6, what is wrong by 1e-2 and more
BF16_TOLERANCE = 0.1  # some roundings of 2^-8 in a row; samples that see each other differ by 0.5 and more
LENGTHS = (7, 2, 13, 1, 9)  # tokens of the samples
WINDOW = 4  # tokens, of sliding windows and chunks: shorter than most samples
VOCABULARY = 64
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")


def packing_kernel(loaded: LoadedRecipe, strategy: Strategy, flash_device: torch.device | None) -> str:
    """The attention kernel for packed rows, by its name in transformers: the recipe's, or the fastest that keeps them
    apart here. `flash_device` runs flash kernels; None: there is none.
    """
    asked = loaded.recipe.model.attn_implementation
    if asked not in ("auto", "sdpa"):
        return asked
    on_gpu = flash_device is not None and not strategy.use_cpu and strategy.mixed_precision != "no"
    varlen = on_gpu and segment_attention.has_varlen()
    return segment_attention.VARLEN if varlen else segment_attention.SEGMENTS


def why_not_isolated(loaded: LoadedRecipe, kernel: str, flash_device: torch.device | None = None) -> str:
    """Why this kernel does not keep packed samples apart in the recipe's model; "" where the proof passes.

    In float32 on the CPU; flash kernels, which run neither there nor in that type, in bf16 on their device, too.
    """
    flash = flash_device is not None and kernel in (segment_attention.VARLEN, *FLASH)
    runs = [] if flash and kernel in FLASH else [(torch.device("cpu"), torch.float32, TOLERANCE)]
    runs += [(flash_device, torch.bfloat16, BF16_TOLERANCE)] if flash else []
    segment_attention.register()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), optional_packages():
            torch.manual_seed(0)
            found = [(_worst_difference(loaded, kernel, *run[:2]), run[2]) for run in runs]
    except Exception as error:  # noqa: BLE001 - a model's own code may raise anything, and then trains padded
        return f"its layers do not run on a packed row ({reason(error)})"
    wrong = [worst for worst, tolerance in found if not worst <= tolerance]
    return f"packed samples differ from samples alone by {wrong[0]:.0e}" if wrong else ""


def with_fused_loss(loaded: LoadedRecipe, strategy: Strategy, facts: ModelFacts) -> ModelFacts:
    """The facts with whether the head may compute the loss; never in fp16, where a gradient without the loss scale
    would vanish.
    """
    return dataclasses.replace(facts, fused_loss=strategy.mixed_precision != "fp16" and takes_fused_loss(loaded))


def takes_fused_loss(loaded: LoadedRecipe) -> bool:
    """Whether the model does nothing with its logits after a plain linear head, so that the head can compute the loss
    itself (objectives/fused_cross_entropy.py): shown by the same loss in float32 either way.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), optional_packages():
            torch.manual_seed(0)
            model = _with_strong_weights(_build(loaded, _tiny(loaded), None))
            if type(model.get_output_embeddings()) is not nn.Linear:
                return False
            ids = torch.randint(1, VOCABULARY, (max(LENGTHS),)).numpy()
            inputs = padded([TokenRow(ids, np.append(IGNORED, ids[1:]))], 0).inputs
            plain, fused = (float(loss(model, **inputs)) for loss in (sft_loss, fused_sft_loss))
    except Exception:  # noqa: BLE001 - a model's own code may raise anything; the plain loss needs no proof
        return False
    return abs(fused - plain) <= TOLERANCE * abs(plain)


def _with_strong_weights(model: nn.Module) -> nn.Module:
    """The model with larger weights than models begin with: attention then tells tokens apart."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def _worst_difference(loaded: LoadedRecipe, kernel: str, device: torch.device, dtype: torch.dtype) -> float:
    """Relative L2 difference of the logits, of the sample where it is largest; packed in this type, alone in
    float32.
    """
    config = _tiny(loaded)
    alone, together = (_build(loaded, config, attention) for attention in (None, kernel))
    _with_strong_weights(alone)
    together.load_state_dict(alone.state_dict())
    alone, together = alone.to(device), together.to(device, dtype)
    samples = [torch.randint(1, VOCABULARY, (length,)).numpy() for length in LENGTHS]
    inputs = dict(packed([TokenRow(ids, np.full(len(ids), IGNORED)) for ids in samples], 0).inputs)
    del inputs["predicting"], inputs["targets"]
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = together(**inputs, use_cache=False).logits.float()
    return max(
        _difference(part, alone(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False).logits)
        for part, ids in zip(found.split(LENGTHS, 1), samples, strict=True)
    )


def _difference(found: Tensor, wanted: Tensor) -> float:
    difference = float((found - wanted).norm() / wanted.norm())
    return difference if difference == difference else float("inf")


def _tiny(loaded: LoadedRecipe) -> PretrainedConfig:
    """The model's config with tiny widths, two periods of layers and windows of a few tokens."""
    config = shrunk_config(loaded)
    text = config.get_text_config()
    shorten(text, min(2 * repeats(text), text.num_hidden_layers))
    text.vocab_size = VOCABULARY
    for holder in {id(config): config, id(text): text}.values():
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(holder, name, None) is not None:
                setattr(holder, name, 0)
        for name in _WINDOWS:
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, WINDOW)
    if isinstance(getattr(text, "moe_intermediate_size", None), int):
        text.moe_intermediate_size = 32
    return config


def _build(loaded: LoadedRecipe, config: PretrainedConfig, attention: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attention} if attention else {}
    trust = loaded.recipe.model.trust_remote_code
    own = copy.deepcopy(config)  # a model keeps its config, and its attention with it
    return AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=trust, **options).eval()
