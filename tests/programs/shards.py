"""Run under a launcher: what one rank holds after the model is loaded. Writes one JSON file per rank.

Arguments: recipe.yaml, out-folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from finetune.engine.libraries import prepare_libraries
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.parameters import parameter_elements
from finetune.recipe.load import load_recipe


def load(recipe_path: str, strategy, device):
    loaded = load_recipe(recipe_path)
    return load_model(loaded, strategy, read_facts(loaded), device)


def main() -> None:
    recipe_path, out = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = from_environment(os.environ, launched_by()[1])
    engine = start_engine(EngineSettings(strategy, 2, 1, 1.0))
    network = load(recipe_path, strategy, engine.device)
    parameters = list(network.parameters())
    found = {
        "parameters": len(parameters),
        "all_elements": sum(map(parameter_elements, parameters)),
        "whole_here": sum(p.numel() for p in parameters),
        "shards_here": sum(p.ds_tensor.numel() for p in parameters),
    }
    (Path(out) / f"{engine.rank}.json").write_text(json.dumps(found))
    engine.barrier()


main()
