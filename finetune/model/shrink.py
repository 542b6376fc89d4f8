"""A small model of the recipe's class, with random weights: what a check can afford."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.errors import UserError
from finetune.model.facts import read_config
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shrink(loaded: LoadedRecipe, folder: Path, vocabulary: int) -> None:
    """Write a random-weight model of the recipe's class with two small layers to `folder`. The same on every rank."""
    from transformers import AutoModelForCausalLM

    config = shrunk_config(loaded)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = (list(dict.fromkeys(text.layer_types)) * 2)[:2]
    text.num_hidden_layers = 2
    text.vocab_size = max(text.vocab_size, vocabulary)
    torch.manual_seed(0)
    trust = loaded.recipe.model.trust_remote_code
    try:
        AutoModelForCausalLM.from_config(config, trust_remote_code=trust).save_pretrained(folder)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"verify: {type(config).__name__} cannot be shrunk ({error}). Use --full.") from error


def shrunk_config(loaded: LoadedRecipe) -> PretrainedConfig:
    """The config of the recipe's model with small widths and no dropout; layers and vocabulary are the model's own."""
    config = read_config(loaded)
    text = config.get_text_config()
    grouped = (getattr(text, "num_key_value_heads", None) or 0) < text.num_attention_heads
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2 if grouped else 4,
        "n_inner": 128,
    }
    if hasattr(text, "qk_rope_head_dim"):  # follows from other widths there
        del sizes["head_dim"]
    for name, size in sizes.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, size)
    for holder in {id(config): config, id(text): text}.values():
        for name in [n for n in vars(holder) if n.endswith(("dropout", "pdrop"))]:
            setattr(holder, name, 0.0)
        vars(holder).pop("quantization_config", None)
    return config
