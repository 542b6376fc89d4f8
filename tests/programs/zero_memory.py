"""Run under a launcher: what DeepSpeed's engines take, storage by storage, one engine after the other in one process
group.

Arguments: recipe.yaml out.json cases.json; a case is {name, stage, precision, offload_optimizer, offload_param,
overrides, settings}. Per case: the effective settings, the bytes alive after prepare and the most that was alive in the
second of two windows of two micro-batches, both of the rank that has most; the bytes written to NVMe by rank 0; and how
far the trained weights then are from those of the first case of the same precision and kind."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from functools import cache
from pathlib import Path

import torch

from finetune.engine.deepspeed.buffers import fill_in
from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.engine.storages import StorageTracker
from finetune.launch.environment import from_environment
from finetune.launch.strategy import Strategy
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.model.distance import relative
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.outline import outline, weights_of_outline
from finetune.model.parameters import Weights
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from tests.support.zero_settings import filled_in

ROWS, TOKENS = 2, 32
references: dict[tuple[str, str], dict[str, torch.Tensor]] = {}


def strategy_of(case: dict) -> Strategy:
    """What accelerate reads from its environment under such a launch file."""
    os.environ.update(
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_MIXED_PRECISION": case["precision"],
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(case["stage"]),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true" if case["stage"] == 3 else "false",
        }
    )
    for section in ("OPTIMIZER", "PARAM"):
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{section}_DEVICE"] = case[f"offload_{section.lower()}"]
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{section}_NVME_PATH"] = case.get("nvme_path", "none")
    return from_environment(os.environ)


@cache
def parameters_of(recipe_path: str, overrides: tuple[str, ...]) -> Weights:
    """The model's parameters, before an engine under which they are sharded."""
    loaded = load_recipe(recipe_path, overrides)
    return weights_of_outline(outline(loaded, read_facts(loaded)), loaded)


def measure(case: dict, recipe_path: str) -> dict:
    """One engine, two windows."""
    started = time.perf_counter()
    strategy, loaded, tracker = strategy_of(case), load_recipe(recipe_path, case["overrides"]), StorageTracker()
    facts = read_facts(loaded)
    outlined = parameters_of(recipe_path, tuple(case["overrides"]))
    with tracker:
        engine = start_engine(EngineSettings(strategy, 2, ROWS, 1.0), lambda line: None)
        section = engine.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        fill_in(section, case["settings"])
        engine.size_buffers(outlined)
        network = load_model(loaded, strategy, facts, engine.device)
        engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
        gc.collect()
        found = {"prepared": tracker.live_bytes}
        batch = MicroBatchShape(ROWS, TOKENS).micro_batch()  # the same on every rank
        tracker.forget(batch.tensors)
        for window in ("first window", "second window"):
            tracker.enter(window)
            for last in (False, True):
                engine.micro_step(batch, 2.0 * ROWS * TOKENS * engine.ranks, last)
        found["peak"] = tracker.peaks["second window"]
    # of the rank that has most
    found = {name: max(there) for name in found for there in [engine.gather_objects(found[name])]}
    found |= {"settings": filled_in(section), "case": case["name"]}
    found["nvme"] = (
        sum(file.stat().st_size for file in Path(strategy.nvme_path).rglob("*.swp")) if strategy.nvme_path else 0
    )
    found["configuration"] = engine.configuration()
    state = engine.full_state_dict(only_trained=True)
    if state:
        found["difference"] = relative(state, references.setdefault((case["precision"], case["kind"]), state))
    engine.release()
    gc.collect()
    return found | {"seconds": time.perf_counter() - started}


def main() -> None:
    recipe_path, out, cases = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    planned = json.loads(Path(cases).read_text())
    for case in planned:
        parameters_of(recipe_path, tuple(case["overrides"]))
    found = [measure(case, recipe_path) for case in planned]
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(found))


main()
