"""A model without weights, from its config alone: shapes and types, for the planner and for buffer sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune.launch.compatibility import FLASH
from finetune.model.facts import ModelFacts, optional_packages, read_config
from finetune.model.load import attention_of, made_ready
from finetune.model.parameters import Weight, Weights
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def outline(loaded: LoadedRecipe, model_facts: ModelFacts, layers: int | None = None) -> nn.Module:
    """What `load_model` would make, on the meta device: shapes and types, no weights, nothing quantised.

    `layers` builds so many of the repeated layers. Raises what a model's own code raises.
    """
    from transformers import AutoModelForCausalLM

    section = loaded.recipe.model
    attention = attention_of(loaded, model_facts)
    if attention in FLASH:  # looks into its masks, which hold no values here; sdpa keeps as much for the backward
        attention = "sdpa"
    with optional_packages(), torch.device("meta"):
        config = read_config(loaded)
        config.__dict__.pop("quantization_config", None)
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, model_facts.vocabulary)
        if layers is not None:
            shorten(text, layers)
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, "float32" if loaded.recipe.lora is None else model_facts.export_dtype),
            trust_remote_code=section.trust_remote_code,
            **({"attn_implementation": attention} if attention else {}),
        )
        return made_ready(model, loaded, model_facts)


def repeats(config: PretrainedConfig) -> int:
    """After how many layers a model's (text) config repeats itself: 1 for most, 6 for five layers of sliding windows
    and one of full attention.
    """
    depth = config.num_hidden_layers
    lists = [list(value) for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == depth]
    return next(n for n in range(1, depth + 1) if all(seen[n:] == seen[:-n] for seen in lists))


def shorten(config: PretrainedConfig, layers: int) -> None:
    """Give a (text) config so many layers, in place: its lists with a value per layer are cut, too."""
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


@dataclass(frozen=True)
class Outline:
    """A whole model: its layers, after how many of them they repeat, and its parameters."""

    layers: int
    period: int
    weights: Weights


_outlined: dict[tuple, Outline] = {}


def outlined(loaded: LoadedRecipe, facts: ModelFacts) -> Outline:
    """The outline of a model, built once. Raises what a model's own code raises.

    Layers whose parameters are not those of the layer one period before (adapters on some of them only, some with
    experts) repeat nothing."""
    recipe = loaded.recipe
    key = (recipe.model, recipe.lora and recipe.lora.model_dump_json(), facts)
    if key not in _outlined:
        network = outline(loaded, facts)
        config = network.config.get_text_config()
        period = repeats(config)
        kinds = [
            [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()]
            for layer in repeated_layers(network)
        ]
        if kinds[period:] != kinds[:-period]:
            period = config.num_hidden_layers
        _outlined[key] = Outline(config.num_hidden_layers, period, weights_of_outline(network, loaded))
    return _outlined[key]


def weights_beforehand(loaded: LoadedRecipe, facts: ModelFacts) -> Weights | None:
    """The model's parameters before they are read; None where its own code cannot be built without them."""
    try:
        return outlined(loaded, facts).weights
    except Exception:  # noqa: BLE001 - loading the model says what is wrong; what asks here does without
        return None


def weights_of_outline(network: nn.Module, loaded: LoadedRecipe) -> Weights:
    """The parameters of an outline as the memory arithmetic sees them; with 4-bit weights, those that will be quantised
    are marked.
    """
    layers = repeated_layers(network)
    number = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    packed = set()
    if loaded.recipe.model.load_in_4bit:
        head = network.get_output_embeddings()
        # integrations/bitsandbytes.py of transformers 5.23: linear layers, and GPT-2's, which hold their weight the
        # other way round
        packed = {
            id(m.weight)
            for m in network.modules()
            if (type(m) is nn.Linear or type(m).__name__ == "Conv1D") and m is not head and not m.weight.requires_grad
        }
    found = tuple(
        Weight(name, p.numel(), p.requires_grad, float(p.element_size()), number.get(id(p)), id(p) in packed)
        for name, p in network.named_parameters()
    )
    return Weights(found, sum(b.numel() * b.element_size() for b in network.buffers()))


def repeated_layers(network: nn.Module) -> list[nn.Module]:
    """The model's transformer layers in their order; [] where none are found."""
    depth = network.config.get_text_config().num_hidden_layers
    return next((list(m) for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), [])
