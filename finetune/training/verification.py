"""Is the update of accumulated micro-batches that of one big batch, on this machine, for this recipe?

Every rank of a launch runs windows of the recipe's rows through the launch's engine with plain SGD, so that the update
is the clipped gradient times the learning rate; rank 0 takes the same rows as one big float32 batch from the same
weights, without any engine. docs/gradient_accumulation.md derives the tolerances.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.batching.plan import BatchPlan
from finetune.data import collate
from finetune.data.prepare import prepare
from finetune.data.token_cache import TokenRow, TokenRows
from finetune.engine.engine import Engine
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.errors import UserError
from finetune.launch.preflight import Resolved
from finetune.model.distance import change, norm, relative
from finetune.model.facts import read_facts
from finetune.model.load import load_model, objective_for
from finetune.model.shrink import shrink
from finetune.model.tokenizer import load_tokenizer, needed_vocabulary, padding_id
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from finetune.training.job import fastest
from finetune.training.one_batch_reference import Reference, accumulate

MOST_MICRO_BATCHES = 8  # of the configured window, without --full
SHORT_ROW_TOKENS = 256  # rows are cut to this, without --full
# Learning rate as a share of the trained weights' norm. The update is read off float32 weights, so it must not be tiny;
# steps of the weights' own size lead LoRA, which begins at zero, to where bf16's rounding alone is 10 % of the
# gradient.
STEP_SHARE = 2.0**-6
SGD = ("training.optim=sgd", "training.learning_rate=1.0", "training.weight_decay=0.0")
# Relative error of a gradient; docs/gradient_accumulation.md says where the factors come from.
TOLERANCE = {"no": 64 * 2.0**-24, "bf16": 16 * 2.0**-8, "fp16": 16 * 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    """One window against one big batch. `gradient_difference` is the relative L2 difference of the clipped gradients,
    `weight_difference` that of all trained weights after the window's step, both from the same weights before it.
    """

    name: str
    rows: int
    micro_batches: int
    gradient_norm_ratio: float
    gradient_difference: float
    weight_difference: float
    tolerance: float
    passed: bool


def verification(recipe_path: str, overrides: Sequence[str], settled: Resolved, folder: Path | None) -> dict[str, Any]:
    """The report, whose cases only rank 0 knows. `folder` is where the shrunk model goes; None verifies the real one.

    Recipe and overrides are read again, with plain SGD and the shrunk model. A collective. Raises UserError.
    """
    loaded, strategy, batch = settled.loaded, settled.strategy, settled.batch
    steps = batch.accumulation_steps if folder is None else min(batch.accumulation_steps, MOST_MICRO_BATCHES)
    tokenizer = load_tokenizer(loaded)
    prepared = prepare(loaded.sample(4 * batch.per_device_rows * batch.ranks * steps), tokenizer, _to_stderr)
    rows = _rows(prepared.train, None if folder is None else SHORT_ROW_TOKENS)
    max_token_id = prepared.summary["max_token_id"]
    changes = [*SGD] + ["lora.dropout=0.0"] * (loaded.recipe.lora is not None)
    if folder is not None:
        shrink(loaded, folder, max_token_id + 1)
        changes += [f"model.name_or_path={folder}", "model.revision=main"]
    ours = {change.partition("=")[0] for change in changes}  # a key may be given once
    small = load_recipe(recipe_path, [o for o in overrides if o.partition("=")[0] not in ours] + changes)
    facts = read_facts(small)
    facts = dataclasses.replace(facts, vocabulary=needed_vocabulary(small, strategy, facts, tokenizer, max_token_id))
    facts, batch = fastest(small, strategy, facts, batch, _to_stderr)
    if batch.row_tokens is not None:  # or all of these shortened rows would fit into one micro-batch
        batch = dataclasses.replace(batch, row_tokens=max(len(row.input_ids) for row in rows))
    padding = padding_id(tokenizer, facts.vocabulary)
    reference = Reference(small, facts, padding) if os.environ.get("RANK", "0") == "0" else None
    engine = start_engine(
        EngineSettings(strategy, batch.accumulation_steps, batch.per_device_rows, settled.max_grad_norm), _to_stderr
    )
    network = load_model(small, strategy, facts, engine.device)
    for module in [network, reference.network] if reference else [network]:
        _no_dropout(module)
    engine.prepare(
        SummedLoss(network, objective_for(network, facts)), make_optimizer(network, small.recipe.training, strategy)
    )
    rate = engine.broadcast_object(STEP_SHARE * norm(engine.full_state_dict(only_trained=True)))
    engine.set_lr(rate)
    if reference is not None:
        reference.set_lr(rate)
    cases = [
        _case(engine, reference, name, [rows[i % len(rows)] for i in range(count)], batch, padding)
        for name, count in _windows(batch.per_device_rows * batch.ranks, steps)
    ]
    different = sum(case is not None and not case.passed for case in cases)
    passed = engine.all_reduce_sum(different)[0] == 0
    engine.barrier()
    return _report(settled, engine, cases, facts.architecture, folder is None, passed)


def _to_stderr(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _rows(source: TokenRows, most_tokens: int | None) -> list[TokenRow]:
    """The rows of a set that still have a trained token when cut to `most_tokens`."""
    cut = [
        TokenRow(row.input_ids[:most_tokens], row.labels[:most_tokens]) for row in map(source.row, range(len(source)))
    ]
    kept = [row for row in cut if (row.labels[1:] != -100).any()]
    if not kept:
        raise UserError(f"verify: no row trains a token in its first {most_tokens}. Use --full.")
    return kept


def _windows(unit: int, steps: int) -> list[tuple[str, int]]:
    """(name, rows) of the windows to try; `unit` rows are one micro-batch on every rank."""
    return [
        ("configured window", unit * steps),
        ("short window", unit * max(1, steps // 2) + 1),
        ("empty micro-batches", unit * max(1, steps - 1) + 1),
        ("K = 1", unit),
    ]


def _case(
    engine: Engine, reference: Reference | None, name: str, rows: list[TokenRow], batch: BatchPlan, padding: int
) -> Case | None:
    """One window through the engine; on rank 0 (with the reference) the case, None elsewhere. A collective."""
    lengths, fewest = [len(row.input_ids) for row in rows], math.ceil(len(rows) / batch.per_device_rows)
    share = batch.deal(range(len(rows)), lengths, fewest)[engine.rank]
    make = collate.padded if batch.row_tokens is None else collate.packed
    share += [()] * name.startswith("empty")  # also where one rank would have none
    before = engine.full_state_dict(only_trained=True)
    accumulate(engine, [make([rows[i] for i in part], padding) for part in share])
    after = engine.full_state_dict(only_trained=True)
    if reference is None:
        return None
    reference.load(before)
    _, wanted_norm = reference.step(rows)
    wanted = change(before, reference.state())
    difference, ratio = relative(change(before, after), wanted), engine.grad_norm() / wanted_norm
    of_weights = relative(after, reference.state())  # the same error as a share of the weights: no condition of its own
    # the update is the difference of two float32 weights: half a unit in the last place of each is all one can read
    tolerance = TOLERANCE[engine.strategy.mixed_precision] + 2.0**-24 * norm(before) / norm(wanted)
    passed = max(difference, abs(ratio - 1)) <= tolerance
    return Case(name, len(rows), len(share), ratio, difference, of_weights, tolerance, passed)


def _no_dropout(network: nn.Module) -> None:
    """Dropout differs from micro-batch to micro-batch by nature; verified without."""

    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _report(
    settled: Resolved, engine: Engine, cases: Sequence[Case | None], architecture: str, full: bool, passed: bool
) -> dict[str, Any]:
    steps = engine.accelerator.gradient_accumulation_steps
    return {
        "passed": passed,
        "model": architecture + ("" if full else ", shrunk"),
        "strategy": dataclasses.asdict(settled.strategy),
        "scale": {"ranks": engine.ranks, "configured_steps": steps, "loss_times": engine.ranks * steps},
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "accelerate", "deepspeed", "transformers")},
        "cases": [dataclasses.asdict(case) for case in cases if case is not None],
    }
