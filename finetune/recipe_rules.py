"""Values of one recipe that do not go together, whatever the launch file: the recipe's part of the compatibility table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.recipe_fields import Recipe


@dataclass(frozen=True)
class RecipeRow:
    """A combination that is refused. `key` is where the message points to."""

    recipe: str  # the combination in words
    key: str
    holds: Callable[[Recipe], bool]
    reason: str
    instead: str


RECIPE_ROWS = (
    RecipeRow(
        recipe="model.load_in_4bit: true without a lora section",
        key="model.load_in_4bit",
        holds=lambda recipe: recipe.model.load_in_4bit and recipe.lora is None,
        reason="4-bit weights cannot be trained",
        instead="add a lora section (QLoRA), or leave load_in_4bit out",
    ),
)


def recipe_refusals(recipe: Recipe) -> list[tuple[str, str]]:
    """(dotted key, sentence) for what a recipe alone gets wrong between two of its own values."""
    rows = [row for row in RECIPE_ROWS if row.holds(recipe)]
    return [(row.key, f"{row.key} is {value_of(recipe, row.key)}, but {row.reason}: {row.instead}.") for row in rows]


def value_of(recipe: Recipe, key: str) -> str:
    """The value of a `section.name` key as its YAML would write it."""
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    return str(value).lower() if isinstance(value, bool) else str(value)
