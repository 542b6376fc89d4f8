"""Run under a launcher: accumulation under this engine against one big batch. Writes one JSON file.

Arguments: recipe.yaml out.json seed random_windows [report], the last for what is reported and not asserted. Each case
gets its own engine in one process group. Windows, lengths and masks are functions of the seed. The yardsticks: one big
float32 batch in plain torch, from the same weights for every window; and for a case's first window one micro-batch per
rank under the same engine and precision."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from finetune.batching.layout import split_into_micro_batches
from finetune.data import collate
from finetune.data.token_cache import TokenRow
from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.launch import compatibility
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.model.distance import change, relative
from finetune.model.facts import read_facts
from finetune.model.load import load_model, objective_for
from finetune.model.segment_attention import SEGMENTS
from finetune.objectives.micro_batch import MicroBatch
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from finetune.training.one_batch_reference import Reference
from tests.programs.communication import count_collectives
from tests.programs.random_rows import random_rows
from tests.support.exact_table import CONFIGURED_STEPS, KINDS, PER_DEVICE_ROWS, WindowCase, random_windows, windows

SGD = ("training.optim=sgd",)
ADAMW = ("training.learning_rate=1e-3", "training.weight_decay=0.01", "training.gradient_checkpointing=false")
# a step that is large against the weights is read off them more exactly; adapters are small and their gradients too
RATE = {"full": ("training.learning_rate=1.0",), "LoRA": ("training.learning_rate=2.0",)}
LONG_WINDOW = 64  # micro-batches, for what a bf16 gradient buffer loses


@dataclass(frozen=True)
class Case:
    """One engine: `windows` one after the other. `broken` is the factor of the scale that is wrong on purpose."""

    name: str
    kind: str
    optimizer: str
    overrides: tuple[str, ...]
    windows: tuple[WindowCase, ...]
    broken: str = ""
    buffer: str = ""  # dtype in which DeepSpeed adds gradients up, where it is not ours
    one_batch: bool = False  # each rank's rows as one micro-batch
    packed: bool = False  # micro-batches without padding, and the loss by the head
    repeated: bool = False  # every micro-batch of a rank is its first one
    yardstick: str = ""  # the case whose first update this one's must equal


def cases(strategy, recipe_path: str, random, extra: int, report: bool) -> list[Case]:
    """Everything this launch runs."""
    sizes = windows(strategy.ranks)
    found = []
    for kind, overrides in KINDS.items():
        if compatibility.refusals(load_recipe(recipe_path, overrides), strategy):
            continue
        sgd, one = SGD + RATE.get(kind, RATE["LoRA"]) + overrides, f"{kind}, SGD, one batch"
        some = (*sizes, *random_windows(random, strategy.ranks, extra))
        found += [
            Case(f"{kind}, SGD", kind, "SGD", sgd, some, yardstick=one, packed=True),
            # in bf16 another layout of the same rows rounds elsewhere
            Case(one, kind, "SGD", sgd, sizes[:1], one_batch=True, packed=strategy.mixed_precision != "no"),
        ]
        for epsilon in ("1e-6", "1e-8") if report else ("1e-6",):
            adam = (*ADAMW, f"training.adam_epsilon={epsilon}", *overrides)
            found += [
                Case(f"{kind}, AdamW{layout}", kind, f"AdamW, epsilon {epsilon}", adam, sizes[1:5], packed=bool(layout))
                for layout in ("", ", packed")
            ]
    if strategy.mixed_precision == "no":
        for broken in ["mean of means", "K"] + ["world"] * (strategy.ranks > 1):
            found.append(Case(f"{broken} wrong", "full", "SGD", SGD + RATE["full"], sizes[1:2], broken))
    return found + long_windows(strategy)


def long_windows(strategy) -> list[Case]:
    """What a bf16 buffer loses over a window: random rows, and one micro-batch again and again, whose sum float32 holds
    exactly.
    """
    if strategy.engine != "deepspeed" or strategy.mixed_precision != "bf16":
        return []
    unit = PER_DEVICE_ROWS * strategy.ranks
    long, short = (WindowCase(f"K = {LONG_WINDOW}", LONG_WINDOW * unit),), (WindowCase("K = 1", unit),)
    settings = ("full", "SGD", SGD + RATE["full"] + ("training.gradient_checkpointing=false",))
    found = []
    for rows, yardstick in (
        ("random", Case("random, one batch", *settings, long, one_batch=True)),
        ("repeated", Case("repeated, one micro-batch", *settings, short)),
    ):
        found.append(yardstick)
        found += [
            Case(
                f"{rows}, {buffer or 'our'} buffer",
                *settings,
                long,
                buffer=buffer,
                repeated=rows == "repeated",
                yardstick=yardstick.name,
            )
            for buffer in ("", "bf16")
        ]
    return found


def rows_of(case: Case, vocabulary: int, seed: int) -> list[list[TokenRow]]:
    """Random rows of each window; the same for cases whose windows begin alike."""
    random = np.random.default_rng(seed)
    if case.repeated:
        ranks = case.windows[0].rows // (LONG_WINDOW * PER_DEVICE_ROWS)
        return [random_rows(random, PER_DEVICE_ROWS * ranks, vocabulary) * LONG_WINDOW]
    return [random_rows(random, window.rows, vocabulary) for window in case.windows]


def denominators(case: Case, engine, share: list, tokens: float) -> list[float]:
    """What each micro-batch is divided by: the window's tokens, unless the case breaks it."""
    if case.broken == "mean of means":
        return [max(b.trained_tokens, 1) * len(share) * engine.ranks for b in share]
    wrong = {"K": engine.accelerator.gradient_accumulation_steps, "world": engine.ranks}.get(case.broken, 1)
    return [tokens * wrong] * len(share)


def micro_batches(case: Case, engine, window: WindowCase, rows: list[TokenRow]) -> list[MicroBatch]:
    """This rank's micro-batches of the window."""
    if case.one_batch:
        share = [range(engine.rank, len(rows), engine.ranks)]
    else:
        share = (
            split_into_micro_batches(range(len(rows)), engine.ranks, PER_DEVICE_ROWS)[engine.rank] + [()] * window.empty
        )
    make = collate.packed if case.packed else collate.padded
    return [make([rows[i] for i in part], 0) for part in share]


def run_case(case: Case, recipe_path: str, strategy, seed: int) -> dict:
    """Every window of the case through its own engine; on rank 0 what `compare` finds, plus the states under
    "states".
    """
    loaded = load_recipe(recipe_path, case.overrides)
    engine = start_engine(EngineSettings(strategy, CONFIGURED_STEPS, PER_DEVICE_ROWS, 1.0))
    if case.buffer:
        engine.accelerator.state.deepspeed_plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": case.buffer}
    facts = replace(read_facts(loaded), attention=SEGMENTS if case.packed else "", fused_loss=case.packed)
    network = load_model(loaded, strategy, facts, engine.device)
    engine.prepare(
        SummedLoss(network, objective_for(network, facts)), make_optimizer(network, loaded.recipe.training, strategy)
    )
    rows = rows_of(case, facts.vocabulary, seed)
    states, results = [engine.full_state_dict(only_trained=True)], []
    for window, part in zip(case.windows, rows, strict=True):
        batches = micro_batches(case, engine, window, part)
        (tokens,) = engine.all_reduce_sum(sum(batch.trained_tokens for batch in batches))
        loss = 0.0
        for k, (batch, divisor) in enumerate(zip(batches, denominators(case, engine, batches, tokens), strict=True)):
            loss += engine.micro_step(batch, divisor, last=k == len(batches) - 1)
        (loss,) = engine.all_reduce_sum(loss / tokens)
        states.append(engine.full_state_dict(only_trained=True))
        results.append(
            {
                "window": window.name,
                "rows": window.rows,
                "K": len(batches),
                "loss": loss,
                "norm": engine.grad_norm(),
                "applied": engine.applied,
            }
        )
    rank = engine.rank
    engine.release()
    return compare(case, loaded, rows, states, results) if rank == 0 else {}


def compare(case: Case, loaded, rows: list[list[TokenRow]], states: list[dict], results: list[dict]) -> dict:
    """Every window's update from the same weights, and the weights after four windows on the reference's own path."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or zero.Init would shard the reference
    reference = Reference(loaded, read_facts(loaded))
    start = relative(states[0], reference.state())
    reference.load(states[0])  # bf16 engines begin with rounded weights
    for part in rows[:4]:
        reference.step(part)
    weights = relative(states[min(4, len(rows))], reference.state())
    if case.optimizer == "SGD":  # AdamW's update depends on more than the weights
        for i, (result, part) in enumerate(zip(results, rows, strict=True)):
            reference.load(states[i])
            loss, norm = reference.step(part)
            result["update_difference"] = relative(
                change(states[i], states[i + 1]), change(states[i], reference.state())
            )
            result["norm_ratio"] = result["norm"] / norm
            result["loss_difference"] = abs(result["loss"] - loss) / loss
    said = {n: v for n, v in asdict(case).items() if n not in ("windows", "overrides")}
    return said | {"start_difference": start, "weight_difference": weights, "windows": results, "states": states}


def against_the_engine(found: list[dict]) -> None:
    """Add to each case with a yardstick the difference of its first update from the yardstick's, in place."""
    by_name = {case["name"]: case for case in found}
    for case in found:
        if case["yardstick"]:
            wanted = change(*by_name[case["yardstick"]]["states"][:2])
            case["from_yardstick"] = relative(change(*case["states"][:2]), wanted)


def main() -> None:
    recipe_path, out, seed, extra, *report = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = from_environment(os.environ, launched_by()[1])
    planned = cases(strategy, recipe_path, np.random.default_rng(int(seed)), int(extra), bool(report))
    found = [run_case(case, recipe_path, strategy, int(seed)) for case in planned]
    # precision changes what travels, not how often: bf16 is counted for the report
    counting = strategy.ranks > 1 and (report or strategy.mixed_precision == "no")
    counted = count_collectives(recipe_path, strategy) if counting else []
    if int(os.environ.get("RANK", "0")) == 0:
        against_the_engine(found)
        found = [{n: v for n, v in case.items() if n != "states"} for case in found]
        text = {
            "ranks": strategy.ranks,
            "engine": strategy.engine,
            "seed": int(seed),
            "cases": found,
            "communication": counted,
        }
        Path(out).write_text(json.dumps(text))


if __name__ == "__main__":
    main()
