"""Runs that are killed and resumed: what each needs of a launch and a recipe, and how it is compared with an unbroken
one.

tests/reliability/test_resume_exact.py runs RUNS; scripts/benchmarks/reliability.py can run the whole cross of kinds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import program
from tests.support.tiny_models import chat_file

KILLED = program("killed_run")
STEPS, SAVED_EVERY, KILLED_AT = 20, 4, 14  # the last checkpoint before the kill is that of step 12
SAME = (
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "rows",
    "epoch",
    "gradient_accumulation_steps",
    "window",
    "total_tokens",
)
COMMON = (f"training.max_steps={STEPS}", f"checkpoint.save_steps={SAVED_EVERY}", "evaluation.eval_steps=6")
LORA = ("lora.r=4", "lora.alpha=8", "lora.dropout=0.1")
QLORA = (*LORA, "model.load_in_4bit=true")
OFFLOAD = dict(zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
ADAPTIVE = "accumulation={schedule: adaptive, smallest: 0.5, largest: 2, measure_every: 1}"
WARMUP = "accumulation={schedule: warmup, warmup: [[0.3, 0.25], [0.7, 0.5], [1.0, 1.0]]}"


@dataclass(frozen=True)
class Run:
    launch: dict
    overrides: tuple[str, ...] = ()


RUNS = {
    "one process, LoRA with dropout, adaptive": Run(dict(ranks=1), (*LORA, ADAPTIVE)),
    "one process, QLoRA, 8-bit AdamW, bf16": Run(
        dict(ranks=1, precision="bf16"),
        (*QLORA[1:], "lora.r=256", "training.optim=adamw_8bit", "training.deterministic=true"),
    ),
    "DDP on 2 ranks, weighted mixture, warm-up of the batch": Run(dict(ranks=2), ("MIXTURE", WARMUP)),
    "DDP on 3 ranks": Run(dict(ranks=3), ("training.global_batch_size=12",)),
    "ZeRO-2, bf16": Run(dict(ranks=2, zero_stage=2, precision="bf16"), ("training.deterministic=true",)),
    "ZeRO-3 with offload": Run(dict(ranks=2, **OFFLOAD), (ADAPTIVE,)),
    "ZeRO-3 with offload, LoRA, bf16": Run(dict(ranks=2, precision="bf16", **OFFLOAD), LORA),
    "ZeRO-1": Run(dict(ranks=2, zero_stage=1)),
    "one process, streaming": Run(dict(ranks=1), ("data.streaming=true", "data.eval=[{path: chat.jsonl}]")),
}

DATA = {
    "map": (),
    "weighted mixture": ("MIXTURE",),
    "streaming": ("data.streaming=true", "data.eval=[{path: chat.jsonl}]"),
}
ENGINES = {
    "one process": dict(ranks=1),
    "DDP on 2 ranks": dict(ranks=2),
    "DDP on 3 ranks": dict(ranks=3),
    "ZeRO-2": dict(ranks=2, zero_stage=2),
    "ZeRO-3 with offload": dict(ranks=2, **OFFLOAD),
}
KINDS = {"full": (), "LoRA": LORA, "QLoRA": QLORA}
SCHEDULES = {"constant": (), "warm-up of the batch": (WARMUP,), "adaptive": (ADAPTIVE,)}
PRECISIONS = {"float32": "no", "bf16": "bf16"}


def cross() -> Iterator[tuple[str, Run]]:
    """(name, run) of every combination of engine, precision, kind of training, data and schedule; some are refused by
    the recipe.
    """
    for engine, precision, kind, data, schedule in itertools.product(ENGINES, PRECISIONS, KINDS, DATA, SCHEDULES):
        rows = ("training.global_batch_size=12",) if ENGINES[engine]["ranks"] == 3 else ()
        exact = ("training.deterministic=true",) if precision == "bf16" else ()
        overrides = (*KINDS[kind], *DATA[data], *SCHEDULES[schedule], *rows, *exact)
        yield (
            f"{engine}, {precision}, {kind}, {data}, {schedule}",
            Run(ENGINES[engine] | {"precision": PRECISIONS[precision]}, overrides),
        )


def overrides_of(run: Run, recipe: Path, folder: Path) -> list[str]:
    """The run's overrides with COMMON before them; a mixture's second file is made in `folder`."""
    overrides = [*COMMON, *run.overrides]
    if "MIXTURE" in overrides:
        other = folder / "other.jsonl"
        other = other if other.exists() else chat_file(other, 30, seed=7)
        overrides.remove("MIXTURE")
        overrides.append(
            f"data.train=[{{path: {recipe.parent / 'chat.jsonl'}, weight: 1.5}}, {{path: {other}, weight: 0.5}}]"
        )
    return overrides


def logged(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    """The exported files, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))}


def differences(broken: Path, whole: Path) -> list[str]:
    """Where a resumed run is not, bit for bit, the unbroken one; empty: nowhere."""
    ours, theirs = logged(broken), logged(whole)
    found = []
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append(f"steps {[row['step'] for row in ours]} instead of {[row['step'] for row in theirs]}")
    for mine, other in zip(ours, theirs, strict=False):
        keys = [key for key in SAME if key in other] if "loss" in other else ["eval_loss"]
        found += [
            f"step {other['step']}: {key} {mine.get(key)} instead of {other[key]}"
            for key in keys
            if mine.get(key) != other[key]
        ]
    return found + ["the exported weights differ"] * (weights(broken) != weights(whole) or not weights(whole))
