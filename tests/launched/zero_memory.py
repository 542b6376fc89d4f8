"""Run under a launcher: what DeepSpeed's engines take, storage by storage, one engine after the other in one process group.

Arguments: recipe.yaml out.json cases.json; a case is {name, stage, precision, offload_optimizer, offload_param, overrides, settings}.
Per case: the model's parameters, the effective settings, the bytes alive after prepare and after a window, the most that was alive
while preparing and in the second of two windows of two micro-batches, and what the weights' sum became.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path[1:1] = [str(ROOT / "tests")]

import torch

from finetune import launch, model, recipe
from finetune.backend import engine as backend
from finetune.backend.probe import prepare_libraries
from finetune.backend.storages import StorageTracker
from finetune.memory.zero_settings import fill_in, filled_in
from finetune.objectives import SummedLoss
from finetune.optim import make_optimizer

ROWS, TOKENS = 2, 32


def strategy_of(case: dict) -> launch.Strategy:
    """What accelerate reads from its environment under such a launch file."""
    os.environ.update({
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": case["precision"],
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(case["stage"]),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true" if case["stage"] == 3 else "false",
    })  # fmt: skip
    for section in ("OPTIMIZER", "PARAM"):
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{section}_DEVICE"] = case[f"offload_{section.lower()}"]
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{section}_NVME_PATH"] = case.get("nvme_path", "none")
    return launch.from_environment(os.environ)


def measure(case: dict, recipe_path: str) -> dict:
    """One engine, two windows."""
    started = time.perf_counter()
    strategy, loaded, tracker = strategy_of(case), recipe.load(recipe_path, case["overrides"]), StorageTracker()
    facts = model.facts(loaded)
    with tracker:
        engine = backend.start(strategy, 2, ROWS, 1.0, lambda line: None)
        section = engine.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        fill_in(section, case["settings"])
        engine.size_buffers(model.outlined(loaded, facts, strategy))
        network = model.load_model(loaded, strategy, facts, engine.device)
        tracker.enter("prepare")
        engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe, strategy))
        gc.collect()
        found = {"prepared": tracker.live_bytes}
        ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        tracker.forget(batch.values())
        for window in range(2):
            tracker.enter(f"window {window}")
            for last in (False, True):
                engine.micro_step(batch, 2 * ids.numel() * engine.ranks, last)
        found["peak"] = tracker.moments["window 1"].bytes
        found["preparing"] = tracker.moments["prepare"].bytes
    state = engine.gather_state(only_trained=True)
    found["settings"] = filled_in(section)
    found["weights"] = sum(t.double().abs().sum().item() for t in state.values())
    engine.release()
    gc.collect()
    return found | {"case": case["name"], "seconds": time.perf_counter() - started}


def main() -> None:
    recipe_path, out, cases = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    found = [measure(case, recipe_path) for case in json.loads(Path(cases).read_text())]
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(found))


main()
