"""LoRA adapters, and the 4-bit weights that they sit on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune.errors import UserError
from finetune.launch.strategy import Strategy
from finetune.model.parameters import PRECISION_DTYPES
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def add_adapters(model: nn.Module, loaded: LoadedRecipe) -> nn.Module:
    """The model with the recipe's LoRA adapters in place. Raises UserError where it has none of the target modules."""
    from peft import LoraConfig, get_peft_model

    lora, revision = loaded.recipe.lora, loaded.recipe.model.revision
    assert lora is not None, "asked only for recipes with a lora section"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(loaded.recipe.training.seed)  # the same adapters on every rank and under every engine
    try:
        return get_peft_model(model, config, revision=None if revision == "main" else revision)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"{loaded.location('lora.target_modules')}: lora.target_modules is {lora.target_modules}, but"
            f" {type(model).__name__} has no such layers. Its linear layers: {', '.join(linear)}."
        ) from error


def nf4_config(strategy: Strategy) -> BitsAndBytesConfig:
    """NF4 with double quantisation; layers compute in the launch's precision."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, PRECISION_DTYPES[strategy.mixed_precision]),
    )


def plain_4bit_layers(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers, if there are any, from repacking themselves for inference on a CPU with
    AVX512-BF16.

    The first forward in evaluation mode would round their scales to bf16 for good, and no gradient flows through the
    repacked layer: an evaluation at step 0 would ruin the training after it [bitsandbytes 0.50, Linear4bit.forward].
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
