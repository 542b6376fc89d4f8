"""The types of the recipe's fields, and the strict section that all of them stand in."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from finetune.recipe.sizes import parse_bytes

PositiveInt = Annotated[int, Field(ge=1)]
NonEmpty = Annotated[str, Field(min_length=1)]

# Hugging Face's names for the optimizers, each with ours.
OPTIM_ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_bnb_paged_8bit": "paged_adamw_8bit",
    "adamw_8bit_paged": "paged_adamw_8bit",
}


def canonical_optimizer(name: Any) -> Any:
    return OPTIM_ALIASES.get(name, name) if isinstance(name, str) else name


def _a_layer(name: str) -> str:
    if name == "all-linear":
        raise ValueError("all-linear stands alone, not in a list: no layer is called so")
    return name


def _auto_or_size(value: Any) -> Any:
    if value != "auto":
        parse_bytes(value)
    return value


AUTO_OR_SIZE = BeforeValidator(_auto_or_size)  # validate.py knows it by itself, to say what parse_bytes says
Share = Annotated[float, Field(gt=0, le=1)]
Stage = Annotated[list[Share], Field(min_length=2, max_length=2)]
LayerName = Annotated[NonEmpty, AfterValidator(_a_layer)]


class Section(BaseModel):
    """Strict: a key that is not declared is an error, and so is a value of another type."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
