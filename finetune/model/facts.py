"""What a model's config says before any weight is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import UserError, reason
from finetune.model.parameters import DTYPE_BYTES
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelFacts:
    """What the config says, before any weight is read. `export_dtype` is model.dtype with auto resolved. `attention` is
    the kernel that keeps packed rows apart (segment_attention.py); "" leaves it to the recipe and to transformers.
    `fused_loss`: whether its head may compute the loss itself. Both are proved (proofs.py).
    """

    architecture: str
    vocabulary: int
    max_positions: int | None
    export_dtype: str
    attention: str = ""
    fused_loss: bool = False


def read_facts(loaded: LoadedRecipe) -> ModelFacts:
    """Read the model's config. Raises UserError (with the recipe's line) when there is none to read, or none to
    train.
    """
    section = loaded.recipe.model
    try:
        with optional_packages():
            config = read_config(loaded)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(not_loadable(loaded, "config.json", error)) from error
    where = loaded.location("model.name_or_path")
    if getattr(config, "quantization_config", None) and loaded.recipe.lora is None:
        raise UserError(
            f"{where}: the weights of {section.name_or_path} are quantised and cannot be trained themselves."
            " Add a lora section, or use the model they were made from."
        )
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = dtype if section.dtype == "auto" else section.dtype
    if dtype not in DTYPE_BYTES:
        raise UserError(
            f"{where}: the weights of {section.name_or_path} are {dtype}; set model.dtype to one of"
            f" {', '.join(DTYPE_BYTES)}."
        )
    text = config.get_text_config()
    return ModelFacts(
        architecture=(config.architectures or [type(config).__name__])[0],
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        export_dtype=dtype,
    )


def read_config(loaded: LoadedRecipe) -> PretrainedConfig:
    """The config of the recipe's model, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(loaded.recipe.model.name_or_path, **source_options(loaded))


def source_options(loaded: LoadedRecipe) -> dict:
    """What every from_pretrained call of a recipe says besides the name."""
    section = loaded.recipe.model
    # false said outright: left open, transformers asks on the terminal whether it may run the model's own code
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Turns the ImportError of a package that is not installed (an attention kernel, what a model's own code imports)
    into a ValueError with its advice, like everything else that is wrong with a model.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(" ".join(str(error).split())) from error


def not_loadable(loaded: LoadedRecipe, what: str, error: Exception) -> str:
    """The message for a part of a model (its config, tokenizer or weights) that cannot be loaded."""
    name = loaded.recipe.model.name_or_path
    if "trust_remote_code" in str(error) and not loaded.recipe.model.trust_remote_code:
        return (
            f"{loaded.location('model.name_or_path')}: model.name_or_path is {name}, which brings Python code of its"
            " own. Read that code, and if you trust its author set model.trust_remote_code: true."
        )
    return (
        f"{loaded.location('model.name_or_path')}: model.name_or_path is {name}, but its {what} cannot be loaded:"
        f" {reason(error)} Give a folder written by save_pretrained, or the id of a model on the Hugging"
        " Face hub that you can reach (for gated models: `hf auth login`)."
    )
