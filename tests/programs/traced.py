"""Traced against real storages, in one process: every case trains a tiny model for real under a tracker and traces the
same recipe.

usage: python traced.py FOLDER [--every]; prints one JSON object per case and K: {"case", "traced", "real", "part"} in
bytes."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.engine.storages import StorageTracker
from finetune.launch.strategy import one_process
from finetune.memory.trace import MicroBatchShape, Precision, profile
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from tests.support.tiny_models import FAMILIES, small_recipe

ROWS, TOKENS = 3, 40
LORA = ["lora.r=4", "lora.alpha=8"]


def real_peaks(loaded, facts, padded: bool, precision: str) -> dict[int, int]:
    """Peak bytes of a window of 1 and of 2 micro-batches, once the optimizer has its states."""
    engine = start_engine(
        EngineSettings(one_process(precision, use_cpu=True), 2, ROWS, loaded.recipe.training.max_grad_norm), print
    )
    network = load_model(loaded, engine.strategy, facts, engine.device)
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, engine.strategy))
    batch = {name: torch.ones(ROWS, TOKENS, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    if padded:
        batch["attention_mask"][0, -7:] = 0
        batch["labels"][0, -7:] = -100
    tracker, peaks = StorageTracker(), {}
    tracker.forget(batch.values())
    with tracker:
        tracker.hold([*network.parameters(), *network.buffers()], "parameters")
        for k in (1, 1, 2):
            tracker.peaks.clear()
            for i in range(k):
                engine.micro_step(batch, 10.0, last=i == k - 1)
            peaks[k] = tracker.peak_bytes
    engine.release()
    return peaks


def cases() -> list[tuple]:
    """(family, checkpointing, LoRA, precision, padded): every family with every pair of the other choices."""
    corners = [
        (False, False, "no", True),
        (False, True, "bf16", False),
        (True, False, "bf16", True),
        (True, True, "no", False),
        (True, False, "no", False),
    ]
    return [(family, *corner) for family in FAMILIES for corner in corners]


def main(folder: Path, every: bool) -> None:
    recipes = {family: small_recipe(folder / family, rows=4, family=family) for family in FAMILIES}
    whole = itertools.product(FAMILIES, (False, True), (False, True), ("no", "bf16"), (False, True))
    for family, checkpointing, lora, precision, padded in whole if every else cases():
        overrides = [f"training.gradient_checkpointing={str(checkpointing).lower()}", *(LORA if lora else [])]
        loaded = load_recipe(recipes[family], overrides)
        facts = read_facts(loaded)
        real = real_peaks(loaded, facts, padded, precision)
        for k, peak in real.items():
            traced = profile(loaded, facts, MicroBatchShape(ROWS, TOKENS, padded), k, Precision(precision))
            case = (
                f"{family}, {'checkpointing, ' * checkpointing}{'LoRA, ' * lora}{precision},"
                f" {'padded' if padded else 'unpadded'}, K={k}"
            )
            print(
                json.dumps({"case": case, "traced": traced.peak_bytes, "real": peak, "part": traced.peak}), flush=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), every="--every" in sys.argv)
