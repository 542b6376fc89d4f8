"""Run under a launcher: how often one micro-batch fetches each weight under ZeRO-3 with parameter offload, without
prefetching.

Arguments: recipe.yaml, out.json, stage3_max_reuse_distance.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from pathlib import Path

import torch

from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.parameters import parameter_elements
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe


def main() -> None:
    recipe_path, out, distance = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    loaded, strategy = load_recipe(recipe_path), from_environment(os.environ, launched_by()[1])
    engine = start_engine(EngineSettings(strategy, 2, 1, 1.0))
    settings = engine.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    settings |= {
        "stage3_max_reuse_distance": int(distance),
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
    network = load_model(loaded, strategy, read_facts(loaded), engine.device)
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
    names = {p.ds_id: name for name, p in engine.inner_model().named_parameters()}
    counts: collections.Counter[str] = collections.Counter()
    for parameter in engine.module.parameters():

        def gather(parameters, *rest, real=parameter.all_gather_coalesced, **options):
            parameters = list(parameters)
            counts.update(names[p.ds_id] for p in parameters)
            return real(parameters, *rest, **options)

        parameter.all_gather_coalesced = gather
    batch = MicroBatchShape(1, 16).micro_batch()
    for i in range(3):  # DeepSpeed knows the order of the modules from the second micro-batch on
        counts.clear()
        engine.micro_step(batch, 16, last=i == 1)
    sizes = {name: parameter_elements(p) for name, p in engine.inner_model().named_parameters()}
    Path(out).write_text(json.dumps({"elements": sizes, "fetches": {name: counts[name] for name in sizes}}))
    engine.close()


main()
