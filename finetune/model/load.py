"""The model's weights, read and made ready for training."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.launch.strategy import Strategy
from finetune.model import segment_attention
from finetune.model.adapters import add_adapters, nf4_config, plain_4bit_layers
from finetune.model.facts import ModelFacts, not_loadable, optional_packages, source_options
from finetune.objectives.sft import Objective, fused_sft_loss, sft_loss
from finetune.recipe.load import LoadedRecipe


def load_model(loaded: LoadedRecipe, strategy: Strategy, model_facts: ModelFacts, device: torch.device) -> nn.Module:
    """The model with its trainable part in place, on the host (QLoRA: on `device`, where it is quantised; meta: shapes
    alone).

    Full fine-tuning trains float32 weights; with LoRA the frozen base stays in model.dtype and the adapters are
    float32. Under ZeRO-3 each rank holds its shard only (zero.Init through transformers, set up by the engine before).
    Raises UserError when the weights cannot be read, or the recipe asks for what this model does not have."""
    section, lora = loaded.recipe.model, loaded.recipe.lora
    options: dict[str, Any] = {"dtype": getattr(torch, "float32" if lora is None else model_facts.export_dtype)}
    if attention := attention_of(loaded, model_facts):
        options["attn_implementation"] = attention
    if section.load_in_4bit:
        options |= {"quantization_config": nf4_config(strategy), "device_map": {"": device}}
    if device.type == "meta":
        options["device_map"] = {"": device}
    model = _read_weights(loaded, options)
    plain_4bit_layers(model)
    if model.get_input_embeddings().num_embeddings < model_facts.vocabulary:
        grow_embedding(model, model_facts.vocabulary)
    return made_ready(model, loaded, model_facts)


def attention_of(loaded: LoadedRecipe, model_facts: ModelFacts) -> str | None:
    """The name of the attention kernel that transformers is given; None leaves the choice to it."""
    asked = loaded.recipe.model.attn_implementation
    if model_facts.attention:
        segment_attention.register()
        return model_facts.attention
    return None if asked == "auto" else asked


def objective_for(model: nn.Module, model_facts: ModelFacts) -> Objective:
    """The loss of a model: by its head itself where that is proved and no adapter sits on the head."""
    plain_head = type(model.get_output_embeddings()) is nn.Linear
    chosen = fused_sft_loss if model_facts.fused_loss and plain_head else sft_loss
    if model_facts.attention not in ("", segment_attention.SEGMENTS, segment_attention.VARLEN):
        return chosen  # its mask is made from the positions

    def loss(network: nn.Module, **inputs: Any) -> Tensor:
        with segment_attention.no_search_for_packing():
            return chosen(network, **inputs)

    return loss


def made_ready(model: nn.Module, loaded: LoadedRecipe, model_facts: ModelFacts) -> nn.Module:
    """A base model with its adapters and recomputed activations, as the recipe says, in training mode."""
    lora = loaded.recipe.lora
    if lora is not None:
        model = add_adapters(model, loaded)
    if loaded.recipe.training.gradient_checkpointing:
        try:
            # non-reentrant: works when the input needs no gradient, as with LoRA's frozen embedding
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"{loaded.location('training.gradient_checkpointing')}: training.gradient_checkpointing is true,"
                f" but {model_facts.architecture} has none. Set it to false."
            ) from error
    model.train()
    return model


def _read_weights(loaded: LoadedRecipe, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    section = loaded.recipe.model
    try:
        with optional_packages():
            model, info = AutoModelForCausalLM.from_pretrained(
                section.name_or_path,
                **source_options(loaded),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise UserError(_not_built(loaded, error)) from error
    # transformers fills what a checkpoint lacks with random numbers and only warns
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise UserError(
            f"{loaded.location('model.name_or_path')}: the checkpoint {section.name_or_path} lacks {len(wrong)} weights"
            f" of {type(model).__name__}, or has them in another shape ({', '.join(wrong[:3])}); they would start at"
            " random. Give a complete checkpoint of a causal language model."
        )
    return model


def _not_built(loaded: LoadedRecipe, error: Exception) -> str:
    section, key = loaded.recipe.model, "model.attn_implementation"
    if section.attn_implementation == "auto" or "attention" not in str(error).lower():
        return not_loadable(loaded, "weights", error)
    reason = " ".join(str(error).split())
    return (
        f"{loaded.location(key)}: {key} is {section.attn_implementation}, which does not work for"
        f" {section.name_or_path} here: {reason} Use auto, or install what it needs."
    )


def grow_embedding(model: nn.Module, rows: int) -> None:
    """Give the embedding and the output head `rows` rows, in place. New rows are the mean of the old; ties are kept."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows, mean_resizing=False)  # its own mean adds noise that would differ between ranks
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for weight in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if weight is not None and len(weight) == rows:
                    weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
