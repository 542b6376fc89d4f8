"""Traced against real storages, in one process: every case trains a tiny model for real under a tracker and traces the
same recipe.

usage: python traced.py FOLDER [--every]; prints one JSON object per case and K: {"case", "traced", "real", "part"} in
bytes."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.engine.storages import StorageTracker
from finetune.launch.strategy import one_process
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.trace import Precision, profile
from finetune.model.facts import read_facts
from finetune.model.load import load_model, objective_for
from finetune.model.segment_attention import SEGMENTS
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from tests.support.tiny_models import FAMILIES, small_recipe

ROWS, TOKENS = 3, 40
SAMPLES = (17, 40, 2, 61)  # longer and shorter than a sliding window of 32
LAYOUTS = {
    "padded": MicroBatchShape(ROWS, TOKENS, trained=50),
    "packed": MicroBatchShape(1, sum(SAMPLES), trained=50, segment_lengths=SAMPLES),
}
LORA = ["lora.r=4", "lora.alpha=8"]


def real_peaks(loaded, facts, shape: MicroBatchShape, precision: str) -> dict[int, int]:
    """Peak bytes of a window of 1 and of 2 micro-batches, once the optimizer has its states."""
    engine = start_engine(
        EngineSettings(one_process(precision, use_cpu=True), 2, ROWS, loaded.recipe.training.max_grad_norm), print
    )
    network = load_model(loaded, engine.strategy, facts, engine.device)
    engine.prepare(
        SummedLoss(network, objective_for(network, facts)),
        make_optimizer(network, loaded.recipe.training, engine.strategy),
    )
    batch = shape.micro_batch()
    tracker, peaks = StorageTracker(), {}
    tracker.forget(batch.tensors)
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
    """(family, checkpointing, LoRA, precision, layout): every family with every pair of the other choices."""
    corners = [
        (False, False, "no", "packed"),
        (False, True, "bf16", "padded"),
        (True, False, "bf16", "packed"),
        (True, True, "no", "padded"),
        (True, False, "no", "padded"),
    ]
    return [(family, *corner) for family in FAMILIES for corner in corners]


def main(folder: Path, every: bool) -> None:
    recipes = {family: small_recipe(folder / family, rows=4, family=family) for family in FAMILIES}
    whole = itertools.product(FAMILIES, (False, True), (False, True), ("no", "bf16"), LAYOUTS)
    for family, checkpointing, lora, precision, layout in whole if every else cases():
        overrides = [f"training.gradient_checkpointing={str(checkpointing).lower()}", *(LORA if lora else [])]
        loaded = load_recipe(recipes[family], overrides)
        shape, packed = LAYOUTS[layout], layout == "packed"
        facts = replace(read_facts(loaded), attention=SEGMENTS if packed else "", fused_loss=packed)
        real = real_peaks(loaded, facts, shape, precision)
        for k, peak in real.items():
            traced = profile(loaded, facts, shape, k, Precision(precision))
            case = f"{family}, {'checkpointing, ' * checkpointing}{'LoRA, ' * lora}{precision}, {layout}, K={k}"
            print(
                json.dumps({"case": case, "traced": traced.peak_bytes, "real": peak, "part": traced.peak}), flush=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), every="--every" in sys.argv)
