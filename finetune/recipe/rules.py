"""Incompatible values of one recipe, whatever the launch file: the recipe's part of the compatibility table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from finetune.recipe.fields import Recipe
from finetune.recipe.row_formats import COLUMNS


@dataclass(frozen=True)
class Incompatible:
    """Settings that are refused together; a line of docs/compatibility.md.

    `holds` takes the recipe; for the rows of finetune/launch/compatibility.py it takes the recipe and the strategy.
    """

    recipe: str  # the recipe's part, in words
    key: str | None  # the recipe key that the message points to; None: the launch file alone is wrong
    holds: Callable[..., bool]
    reason: str
    instead: str
    launch: str = "any"  # the launch file's part, in words


def _rise_to_one(shares: list[float]) -> bool:
    return all(a < b for a, b in pairwise(shares)) and shares[-1] == 1.0


RECIPE_ROWS = (
    Incompatible(
        recipe="model.load_in_4bit: true without a lora section",
        key="model.load_in_4bit",
        holds=lambda recipe: recipe.model.load_in_4bit and recipe.lora is None,
        reason="4-bit weights cannot be trained",
        instead="add a lora section (QLoRA), or leave load_in_4bit out",
    ),
    Incompatible(
        recipe="training.lr_scaling: sqrt or linear without training.reference_batch_size",
        key="training.lr_scaling",
        holds=lambda recipe: recipe.training.lr_scaling != "none" and recipe.training.reference_batch_size is None,
        reason="nothing says which batch the learning rate was chosen for",
        instead="add training.reference_batch_size, the rows per optimizer step that learning_rate belongs to",
    ),
    Incompatible(
        recipe="training.reference_batch_size without training.lr_scaling",
        key="training.reference_batch_size",
        holds=lambda recipe: (
            recipe.training.reference_batch_size is not None and "lr_scaling" not in recipe.training.model_fields_set
        ),
        reason="it does nothing without training.lr_scaling",
        instead="add lr_scaling: sqrt or linear, or leave reference_batch_size out",
    ),
    Incompatible(
        recipe="accumulation.warmup whose shares of the run do not rise to 1",
        key="accumulation.warmup",
        holds=lambda recipe: (
            not recipe.accumulation.by_epoch and not _rise_to_one([until for until, _ in recipe.accumulation.shares])
        ),
        reason="the first numbers of the pairs are shares of the run: they must rise, and the last one is 1.0",
        instead="write for example [[0.25, 0.1], [0.5, 0.2], [1.0, 1.0]]",
    ),
    Incompatible(
        recipe="accumulation.warmup as one K per epoch with training.max_steps",
        key="accumulation.warmup",
        holds=lambda recipe: recipe.accumulation.by_epoch and recipe.training.num_train_epochs is None,
        reason="with training.max_steps nothing says when an epoch ends",
        instead="use num_train_epochs, or pairs such as [[0.25, 0.1], [0.5, 0.2], [1.0, 1.0]]",
    ),
    Incompatible(
        recipe="accumulation.warmup without accumulation.schedule",
        key="accumulation.warmup",
        holds=lambda recipe: (
            "warmup" in recipe.accumulation.model_fields_set and "schedule" not in recipe.accumulation.model_fields_set
        ),
        reason="it does nothing without accumulation.schedule",
        instead="add schedule: warmup, or leave it out",
    ),
    *(
        Incompatible(
            recipe=f"accumulation.{name} without accumulation.schedule",
            key=f"accumulation.{name}",
            holds=lambda recipe, name=name: (
                name in recipe.accumulation.model_fields_set and "schedule" not in recipe.accumulation.model_fields_set
            ),  # a written schedule says that it is meant to do nothing
            reason="it does nothing without accumulation.schedule: adaptive",
            instead="add schedule: adaptive, or leave it out",
        )
        for name in ("smallest", "largest", "measure_every")
    ),
    Incompatible(
        recipe="schedule: adaptive whose smallest and largest leave one size",
        key="accumulation.smallest",
        holds=lambda recipe: (
            recipe.accumulation.schedule == "adaptive"
            and recipe.accumulation.smallest > 0.5
            and recipe.accumulation.largest < 2
        ),
        reason="sizes are the global batch times powers of two, and none but 1 lies between smallest and largest",
        instead="use smallest 0.5 or less, or largest 2 or more",
    ),
    Incompatible(
        recipe="data.streaming: true without training.max_steps",
        key="data.streaming",
        holds=lambda recipe: recipe.data.streaming and recipe.training.max_steps is None,
        reason="a stream has no end that is known beforehand",
        instead="set training.max_steps",
    ),
    Incompatible(
        recipe="data.eval_fraction with data.streaming: true",
        key="data.eval_fraction",
        holds=lambda recipe: recipe.data.streaming and recipe.data.eval_fraction is not None,
        reason="data.streaming is true, and a share of all rows is not known before they are read",
        instead="name evaluation rows in data.eval",
    ),
    Incompatible(
        recipe="data.max_rows with data.streaming: true",
        key="data.max_rows",
        holds=lambda recipe: recipe.data.streaming and recipe.data.max_rows is not None,
        reason="data.streaming is true, and training.max_steps says how many rows are taken",
        instead="leave data.max_rows out",
    ),
)


def recipe_refusals(recipe: Recipe) -> list[tuple[str, str]]:
    """(dotted key, sentence) for what a recipe alone gets wrong between two of its own values."""
    found = []
    for row in RECIPE_ROWS:
        if row.holds(recipe):
            assert row.key is not None, "every row of the recipe's part points to a key"
            said = f"{row.key} is {value_of(recipe, row.key)}, but {row.reason}: {row.instead}."
            found.append((row.key, said))
    return found + _source_refusals(recipe)


def _source_refusals(recipe: Recipe) -> list[tuple[str, str]]:
    parts = (("train", recipe.data.train), ("eval", recipe.data.eval or []))
    sources = [(part, f"data.{part}[{i}]", source) for part, found in parts for i, source in enumerate(found)]
    wrong = []
    for part, key, source in sources:
        if part == "eval" and source.weight != 1:
            said = f"{key}.weight is {source.weight:g}, but evaluation takes every row once: leave weight out."
            wrong.append((f"{key}.weight", said))
        for name in [name for name in source.columns if name not in COLUMNS]:
            said = f"{key}.columns names '{name}', which is none of ours: {', '.join(COLUMNS)}. Write {{ours: theirs}}."
            wrong.append((f"{key}.columns", said))
    return wrong


def value_of(recipe: Recipe, key: str) -> str:
    """The value of a `section.name` key as its YAML would write it."""
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    return str(value).lower() if isinstance(value, bool) else str(value)
