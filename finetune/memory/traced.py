"""Traces of a micro-batch, each made once; what is linear in them is computed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

from finetune.errors import UserError
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.trace import Precision, Profile, combined, profile
from finetune.model.facts import ModelFacts
from finetune.model.outline import outlined
from finetune.objectives.fused_cross_entropy import chunk_positions
from finetune.recipe.load import LoadedRecipe

Place = tuple[int, int]  # rows, positions with logits
# None where the model cannot be traced
traces: dict[tuple, dict[Place, Profile] | None] = {}


def traced_once(
    loaded: LoadedRecipe, facts: ModelFacts, shape: MicroBatchShape, micro_batches: int, precision: Precision
) -> Profile | None:
    """`profile`, which is a function of these alone; None where the model's own code does not run on fake tensors.

    Few numbers of rows and of positions with logits are traced; others are computed from them, event by event, because
    every tensor's size is a constant, a multiple of the rows and one of the positions (tests/commands/test_plan.py
    compares with traces)."""
    recipe = loaded.recipe
    if recipe.model.load_in_4bit and (precision.mixed_precision, facts.export_dtype) == ("bf16", "bfloat16"):
        # what bitsandbytes makes of packed weights, each time, is what LoRA computes with: the same trace
        unpacked = recipe.model.model_copy(update={"load_in_4bit": False})
        plain = dataclasses.replace(loaded, recipe=recipe.model_copy(update={"model": unpacked}))
        seen = traced_once(plain, facts, shape, micro_batches, precision)
        return seen and Profile(seen.series, outlined(loaded, facts).weights)
    key = (
        recipe.model,
        recipe.lora and recipe.lora.model_dump_json(),
        recipe.training.gradient_checkpointing,
        recipe.training.optim,
        bool(recipe.training.weight_decay),
        bool(recipe.training.max_grad_norm),
        facts,
        shape.tokens,
        shape.segment_lengths,
        _chunks(shape, facts),
        micro_batches,
        precision,
    )
    known = traces.setdefault(key, {})
    if known is None:
        return None
    place = (shape.rows, shape.predicting)
    if place not in known:
        if parts := factors(list(known), place):
            one = next(iter(known.values()))
            series = combined([(factor, known[there].series) for there, factor in parts])
            return Profile(series, one.weights)
        try:
            known[place] = _quietly_profiled(loaded, facts, shape, micro_batches, precision)
        except UserError:
            raise
        except Exception:  # noqa: BLE001 - a model's own code may look at values, which fake tensors have none of; formulas stand in
            traces[key] = None
            return None
    return known[place]


def _chunks(shape: MicroBatchShape, facts: ModelFacts) -> bool:
    """Whether a head that computes the loss has more than one chunk of positions: then a chunk is no longer a multiple
    of the positions.
    """
    return facts.fused_loss and shape.predicting > chunk_positions(facts.vocabulary)


def factors(known: Sequence[Place], wanted: Place) -> list[tuple[Place, Fraction]]:
    """Known places with factors that add up to 1 and give the wanted place, so that anything linear is given, too; []
    where there are none.
    """
    (x, y) = wanted
    for (ax, ay), (bx, by) in combinations(known, 2):
        across = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if across == 0:  # on one line
            share = Fraction(x - ax, bx - ax) if bx != ax else Fraction(y - ay, by - ay)
            return [((ax, ay), 1 - share), ((bx, by), share)]
    for (ax, ay), (bx, by), (cx, cy) in combinations(known, 3):
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area:
            second = Fraction((x - ax) * (cy - ay) - (y - ay) * (cx - ax), area)
            third = Fraction((bx - ax) * (y - ay) - (by - ay) * (x - ax), area)
            return [((ax, ay), 1 - second - third), ((bx, by), second), ((cx, cy), third)]
    return []


def _quietly_profiled(
    loaded: LoadedRecipe, facts: ModelFacts, shape: MicroBatchShape, micro_batches: int, precision: Precision
) -> Profile:
    """Without the traceback that torch logs of an operation that refuses fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        return profile(loaded, facts, shape, micro_batches, precision)
    finally:
        log.setLevel(level)
