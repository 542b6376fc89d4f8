"""A small model of the recipe's class, with random weights: what a check can afford."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.errors import UserError
from finetune.recipe.load import LoadedRecipe


def shrink(loaded: LoadedRecipe, folder: Path, vocabulary: int) -> None:
    """Write a random-weight model of the recipe's class with two small layers to `folder`. The same on every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    section = loaded.recipe.model
    trust = {"trust_remote_code": section.trust_remote_code}
    config = AutoConfig.from_pretrained(section.name_or_path, revision=section.revision, **trust)
    text = config.get_text_config()
    grouped = (getattr(text, "num_key_value_heads", None) or 0) < text.num_attention_heads
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2 if grouped else 4,
        "n_inner": 128,
    }
    for name, size in sizes.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, size)
    if getattr(text, "layer_types", None):
        text.layer_types = list(dict.fromkeys([*text.layer_types, *text.layer_types]))[:2] * 2
        text.layer_types = text.layer_types[:2]
    text.vocab_size = max(text.vocab_size, vocabulary)
    for holder in {id(config): config, id(text): text}.values():
        for name in [n for n in vars(holder) if n.endswith(("dropout", "pdrop"))]:
            setattr(holder, name, 0.0)
        vars(holder).pop("quantization_config", None)
    torch.manual_seed(0)
    try:
        AutoModelForCausalLM.from_config(config, **trust).save_pretrained(folder)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"verify: {type(config).__name__} cannot be shrunk ({error}). Use --full.") from error
