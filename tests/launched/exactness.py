"""Run under a launcher: accumulation under this engine against one big batch in plain torch. Writes one JSON file.

Arguments: recipe.yaml out.json. Everything is float32 on ragged rows; each case gets its own engine in one process group.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from finetune import data, launch, model, recipe
from finetune.backend import engine as backend
from finetune.backend.parents import launched_by
from finetune.backend.probe import prepare_libraries
from finetune.data import Row
from finetune.objectives import SummedLoss, trained_tokens
from finetune.one_batch import Reference, change, relative
from finetune.optim import make_optimizer
from finetune.windows import deal

WINDOW_ROWS = (16, 16, 7, 2, 1, 40)  # full, full, short, K = 1, one row (an empty rank), K above the configured value
PER_DEVICE_ROWS = 2
SGD = ("training.optim=sgd", "training.learning_rate=1.0")
ADAMW = ("training.learning_rate=1e-3", "training.adam_epsilon=1e-6", "training.weight_decay=0.01")
LORA = ("lora.r=4", "lora.alpha=8")
LORA_SGD = SGD[:1] + ("training.learning_rate=2.0",) + LORA  # a small gradient: a larger step is read off more exactly


@dataclass
class Case:
    name: str
    overrides: tuple[str, ...]
    broken: str = ""  # which factor of the scale is wrong on purpose
    windows: tuple[int, ...] = WINDOW_ROWS


CASES = [
    Case("full, SGD", SGD),
    Case("full, AdamW", ADAMW, windows=WINDOW_ROWS[:4]),
    Case("LoRA, SGD", LORA_SGD),
    Case("LoRA, AdamW", ADAMW + LORA, windows=WINDOW_ROWS[:4]),
    Case("full, SGD, mean of means", SGD, "mean of means", WINDOW_ROWS[:1]),
    Case("full, SGD, K forgotten", SGD, "K", WINDOW_ROWS[:1]),
    Case("full, SGD, world forgotten", SGD, "world", WINDOW_ROWS[:1]),
]


def ragged_rows(count: int, vocabulary: int) -> list[Row]:
    """Rows of 3 to 48 tokens, a random part of each trained."""
    random = np.random.default_rng(5)
    rows = []
    for _ in range(count):
        length = int(random.integers(3, 49))
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(random.random(length) < random.random(), ids, -100).astype(np.int32)
        labels[0], labels[-1] = -100, ids[-1]
        rows.append(Row(ids, labels))
    return rows


def denominators(case: Case, engine, share: list, tokens: float) -> list[float]:
    """What each micro-batch is divided by: the window's tokens, unless the case breaks it."""
    if case.broken == "mean of means":
        return [max(trained_tokens(b), 1) * len(share) * engine.ranks for b in share]
    wrong = {"K": engine.accelerator.gradient_accumulation_steps, "world": engine.ranks}.get(case.broken, 1)
    return [tokens * wrong] * len(share)


def run_case(case: Case, recipe_path: str, strategy) -> dict:
    loaded = recipe.load(recipe_path, case.overrides)
    engine = backend.start(strategy, 16 // (PER_DEVICE_ROWS * strategy.ranks), PER_DEVICE_ROWS, 1.0)
    network = model.load_model(loaded, strategy, model.facts(loaded), engine.device)
    optimizer = make_optimizer(network, loaded.recipe, strategy)
    engine.prepare(SummedLoss(network), optimizer)
    rows = ragged_rows(sum(case.windows), model.facts(loaded).vocabulary)
    states, results = [engine.gather_state(only_trained=True)], []
    first = 0
    for count in case.windows:
        window = list(range(first, first + count))
        first += count
        share = deal(window, engine.ranks, PER_DEVICE_ROWS)[engine.rank]
        batches = [data.collate([rows[i] for i in part], 0) for part in share]
        (tokens,) = engine.total(sum(map(trained_tokens, batches)))
        loss = 0.0
        for k, (batch, divisor) in enumerate(zip(batches, denominators(case, engine, batches, tokens), strict=True)):
            loss += engine.micro_step(batch, divisor, last=k == len(batches) - 1)
        (loss,) = engine.total(loss / tokens)
        states.append(engine.gather_state(only_trained=True))
        results.append({"rows": count, "K": len(batches), "loss": loss, "norm": engine.grad_norm(), "applied": engine.applied})
    rank = engine.rank
    engine.release()
    return compare(case, loaded, rows, states, results) if rank == 0 else {}


def compare(case: Case, loaded, rows: list[Row], states: list[dict], results: list[dict]) -> dict:
    """Every window's update from the same weights, and the weights after at most four windows on the reference's own path."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or zero.Init would shard the reference
    reference = Reference(loaded, model.facts(loaded))
    start, first = relative(states[0], reference.state()), 0
    parts = []
    for result in results:
        parts.append(rows[first : first + result["rows"]])
        first += result["rows"]
    for part in parts[:4]:
        reference.step(part)
    weights = relative(states[min(4, len(parts))], reference.state())
    for i, (result, part) in enumerate(zip(results, parts, strict=True)):
        reference.load(states[i])
        loss, norm = reference.step(part)
        if SGD[0] in case.overrides:  # AdamW's update depends on more than the weights
            result["update_difference"] = relative(change(states[i], states[i + 1]), change(states[i], reference.state()))
        result["norm_ratio"] = result["norm"] / norm
        result["loss_difference"] = abs(result["loss"] - loss) / loss
    return asdict(case) | {"start_difference": start, "weight_difference": weights, "windows_run": results}


def main() -> None:
    recipe_path, out = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = launch.from_environment(os.environ, launched_by()[1])
    found = [run_case(case, recipe_path, strategy) for case in CASES if case.broken != "world" or strategy.ranks > 1]
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps({"ranks": strategy.ranks, "engine": strategy.engine, "cases": found}))


if __name__ == "__main__":
    main()
