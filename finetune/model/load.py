"""The model: its facts from the config alone, its tokenizer, and its weights made ready for training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.errors import UserError, reason
from finetune.launch.strategy import Strategy
from finetune.recipe.load import Loaded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelFacts:
    """What the config says, before any weight is read. `export_dtype` is model.dtype with auto resolved."""

    architecture: str
    vocabulary: int
    max_positions: int | None
    export_dtype: str


def facts(loaded: Loaded) -> ModelFacts:
    """Read the model's config. Raises UserError (with the recipe's line) when there is none to read, or none to
    train.
    """
    section = loaded.recipe.model
    try:
        with optional_packages():
            config = _config(loaded)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_not_loadable(loaded, "config.json", error)) from error
    where = loaded.where("model.name_or_path")
    if getattr(config, "quantization_config", None) and loaded.recipe.lora is None:
        raise UserError(
            f"{where}: the weights of {section.name_or_path} are quantised and cannot be trained themselves."
            " Add a lora section, or use the model they were made from."
        )
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = dtype if section.dtype == "auto" else section.dtype
    if dtype not in DTYPES:
        raise UserError(
            f"{where}: the weights of {section.name_or_path} are {dtype}; set model.dtype to one of"
            f" {', '.join(DTYPES)}."
        )
    text = config.get_text_config()
    return ModelFacts(
        architecture=(config.architectures or [type(config).__name__])[0],
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        export_dtype=dtype,
    )


def _config(loaded: Loaded):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(loaded.recipe.model.name_or_path, **_source(loaded))


def _source(loaded: Loaded) -> dict:
    """What every from_pretrained call of a recipe says besides the name."""
    section = loaded.recipe.model
    # false said outright: left open, transformers asks on the terminal whether it may run the model's own code
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}


def load_tokenizer(loaded: Loaded):
    """The model's tokenizer. Raises UserError when the folder or hub id has none."""
    from transformers import AutoTokenizer

    section = loaded.recipe.model
    try:
        with optional_packages():
            tokenizer = AutoTokenizer.from_pretrained(section.name_or_path, **_source(loaded))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_not_loadable(loaded, "tokenizer", error)) from error
    return tokenizer


def padding_id(tokenizer, vocabulary: int) -> int:
    """The token id that fills rows up. What is trained is decided by position, so any id of the embedding serves.

    The tokenizer itself stays as it is: exported with eos as its pad token it would mislead the next trainer.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None and i < vocabulary), 0)


def _not_loadable(loaded: Loaded, what: str, error: Exception) -> str:
    name = loaded.recipe.model.name_or_path
    if "trust_remote_code" in str(error) and not loaded.recipe.model.trust_remote_code:
        return (
            f"{loaded.where('model.name_or_path')}: model.name_or_path is {name}, which brings Python code of its own."
            " Read that code, and if you trust its author set model.trust_remote_code: true."
        )
    return (
        f"{loaded.where('model.name_or_path')}: model.name_or_path is {name}, but its {what} cannot be loaded:"
        f" {reason(error)} Give a folder written by save_pretrained, or the id of a model on the Hugging"
        " Face hub that you can reach (for gated models: `hf auth login`)."
    )


def _not_built(loaded: Loaded, error: Exception) -> str:
    section, key = loaded.recipe.model, "model.attn_implementation"
    if section.attn_implementation == "auto" or "attention" not in str(error).lower():
        return _not_loadable(loaded, "weights", error)
    reason = " ".join(str(error).split())
    return (
        f"{loaded.where(key)}: {key} is {section.attn_implementation}, which does not work for {section.name_or_path}"
        f" here: {reason} Use auto, or install what it needs."
    )


def load_model(loaded: Loaded, strategy: Strategy, model_facts: ModelFacts, device: torch.device) -> nn.Module:
    """The model with its trainable part in place, on the host (QLoRA: on `device`, where it is quantised; meta: shapes
    alone).

    Full fine-tuning trains float32 weights; with LoRA the frozen base stays in model.dtype and the adapters are
    float32. Under ZeRO-3 each rank holds its shard only (zero.Init through transformers, set up by the engine before).
    Raises UserError when the weights cannot be read, or the recipe asks for what this model does not have."""
    section, lora = loaded.recipe.model, loaded.recipe.lora
    options = {"dtype": torch.float32 if lora is None else DTYPES[model_facts.export_dtype]}
    if section.attn_implementation != "auto":
        options["attn_implementation"] = section.attn_implementation
    if section.load_in_4bit:
        options |= {"quantization_config": _nf4(strategy), "device_map": {"": device}}
    if device.type == "meta":
        options["device_map"] = {"": device}
    model = _read_weights(loaded, options)
    plain_4bit_layers(model)
    if model.get_input_embeddings().num_embeddings < model_facts.vocabulary:
        grow_embedding(model, model_facts.vocabulary)
    return _made_ready(model, loaded, model_facts)


def outline(
    loaded: Loaded, model_facts: ModelFacts, layers: int | None = None, attention: str | None = None
) -> nn.Module:
    """What `load_model` would make, from the config alone and on the meta device: shapes and types, no weights, nothing
    quantised.

    `layers` builds so many of the repeated layers, `attention` another kernel. Raises what a model's own code raises.
    """
    from transformers import AutoModelForCausalLM

    section = loaded.recipe.model
    attention = attention or (None if section.attn_implementation == "auto" else section.attn_implementation)
    with optional_packages(), torch.device("meta"):
        config = _config(loaded)
        vars(config).pop("quantization_config", None)
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, model_facts.vocabulary)
        if layers is not None:
            _shorten(text, layers)
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32 if loaded.recipe.lora is None else DTYPES[model_facts.export_dtype],
            trust_remote_code=section.trust_remote_code,
            **({"attn_implementation": attention} if attention else {}),
        )
        return _made_ready(model, loaded, model_facts)


def repeats(config) -> int:
    """After how many layers a model's (text) config says the same again: 1 for most, 6 for five sliding windows and a
    full attention.
    """
    depth = config.num_hidden_layers
    lists = [list(value) for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == depth]
    return next(n for n in range(1, depth + 1) if all(seen[n:] == seen[:-n] for seen in lists))


def _shorten(config, layers: int) -> None:
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def _made_ready(model: nn.Module, loaded: Loaded, model_facts: ModelFacts) -> nn.Module:
    """A base model with its adapters and recomputed activations, as the recipe says, in training mode."""
    lora = loaded.recipe.lora
    if lora is not None:
        model = _add_adapters(model, loaded)
    if loaded.recipe.training.gradient_checkpointing:
        try:
            # non-reentrant: works when the input needs no gradient, as with LoRA's frozen embedding
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"{loaded.where('training.gradient_checkpointing')}: training.gradient_checkpointing is true,"
                f" but {model_facts.architecture} has none. Set it to false."
            ) from error
    model.train()
    return model


def _read_weights(loaded: Loaded, options: dict) -> nn.Module:
    from transformers import AutoModelForCausalLM

    section = loaded.recipe.model
    try:
        with optional_packages():
            model, info = AutoModelForCausalLM.from_pretrained(
                section.name_or_path,
                **_source(loaded),
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
            f"{loaded.where('model.name_or_path')}: the checkpoint {section.name_or_path} lacks {len(wrong)} weights of"
            f" {type(model).__name__}, or has them in another shape ({', '.join(wrong[:3])}); they would start at"
            " random. Give a complete checkpoint of a causal language model."
        )
    return model


def needed_vocabulary(loaded: Loaded, strategy: Strategy, model_facts: ModelFacts, tokenizer, max_token_id: int) -> int:
    """Rows the embedding must have for the data's token ids, up to `max_token_id`: ids outside make it grow.

    Raises UserError where new rows would not be trained, or it cannot grow. Padding never needs it: `padding_id`.
    """
    rows = model_facts.vocabulary
    if max_token_id < rows:
        return rows
    found = (
        f"{loaded.where('model.name_or_path')}: the tokenizer gives token id {max_token_id}"
        f" ({tokenizer.convert_ids_to_tokens(max_token_id)!r}), but the model's embedding ends at {rows - 1}"
    )
    if loaded.recipe.lora is not None:
        raise UserError(
            f"{found}, and with a lora section new rows would stay untrained. Use the tokenizer the model was"
            " trained with, or full fine-tuning, which lets the embedding grow."
        )
    if strategy.zero_stage == 3:
        raise UserError(
            f"{found}, and under ZeRO-3 it cannot grow. Use the tokenizer the model was trained with, ZeRO-2, or"
            " a copy of the model whose embedding has been resized."
        )
    return max(max_token_id, *tokenizer.get_vocab().values()) + 1


def grow_embedding(model: nn.Module, rows: int) -> None:
    """Give the embedding and the output head `rows` rows, in place. New rows are the mean of the old; ties are kept."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows, mean_resizing=False)  # its own mean adds noise that would differ between ranks
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for weight in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if weight is not None and len(weight) == rows:
                    weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def _nf4(strategy: Strategy):
    from transformers import BitsAndBytesConfig

    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(strategy.mixed_precision, torch.float32)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _add_adapters(model: nn.Module, loaded: Loaded) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora, revision = loaded.recipe.lora, loaded.recipe.model.revision
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
            f"{loaded.where('lora.target_modules')}: lora.target_modules is {lora.target_modules}, but"
            f" {type(model).__name__} has no such layers. Its linear layers: {', '.join(linear)}."
        ) from error


def parameter_counts(model: nn.Module, elements: Callable[[nn.Parameter], int]) -> tuple[int, int]:
    """(trained, all) parameters; `elements(parameter)` counts whole parameters also where ZeRO-3 holds shards."""
    trained = total = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)  # two 4-bit weights lie in one byte
        count = elements(parameter) if packed is None else math.prod(packed.shape)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """What transformers reads inside may want a package that is not installed (an attention kernel, what a model's own
    code imports): that is then a ValueError with its advice, like everything else that is wrong with a model.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(" ".join(str(error).split())) from error


def plain_4bit_layers(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers, if there are any, from repacking themselves for inference on a CPU with
    AVX512-BF16.

    The first forward in evaluation mode would round their scales to bf16 for good, and no gradient flows through the
    repacked layer: an evaluation at step 0 would ruin the training after it [bitsandbytes 0.50, Linear4bit.forward].
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
