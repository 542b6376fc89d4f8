"""Run under a launcher, one process or DDP: bytes of all storages alive at rest and between micro-batches. Rank 0
writes one JSON file.

Arguments: recipe.yaml, out.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.engine.storages import StorageTracker
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe


def main() -> None:
    recipe_path, out = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    loaded, strategy = load_recipe(recipe_path), from_environment(os.environ, launched_by()[1])
    engine = start_engine(EngineSettings(strategy, 3, 1, 1.0))
    network = load_model(loaded, strategy, read_facts(loaded), engine.device)
    batch = MicroBatchShape(1, 16).micro_batch()
    with StorageTracker() as tracker:
        tracker.forget(batch.tensors)
        tracker.hold([*network.parameters(), *network.buffers()], "parameters")
        engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
        engine.warm_up_ddp_buckets(batch)
        for _ in range(2):
            for k in range(3):
                engine.micro_step(batch, 45, last=k == 2)
                if k == 1:
                    accumulating = tracker.live_bytes
        resting = tracker.live_bytes
        tracker.enter("checkpoint")
        engine.save_state(Path(out).parent)
        tracker.enter("export")
        state = engine.full_state_dict(only_trained=loaded.recipe.lora is not None)
        del state
    weights = [[n, p.numel(), p.requires_grad, p.element_size()] for n, p in network.named_parameters()]
    found = {
        "weights": weights,
        "buffers_bytes": sum(b.nbytes for b in network.buffers()),
        "accumulating": accumulating,
        "resting": resting,
        "saving": max(tracker.peaks[moment] for moment in ("checkpoint", "export")) - resting,
    }
    if engine.rank == 0:
        Path(out).write_text(json.dumps(found))
    engine.close()


main()
