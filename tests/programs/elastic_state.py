"""Run under a launcher: what of an engine's state arrives on another number of ranks. Writes one JSON file.

Arguments: recipe.yaml folder. The first launch on a folder trains every case for a few windows, saves it, dumps its
whole float32 weights and moments, and trains on. Later launches load each checkpoint, compare bit for bit with the
dump, and train on."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state

from finetune.batching.layout import split_into_micro_batches
from finetune.batching.windows import Position
from finetune.checkpoint import checkpoint, snapshots
from finetune.checkpoint.progress import Progress
from finetune.data.collate import padded
from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from tests.programs.random_rows import random_rows

BEFORE, AFTER, ROWS = 3, 2, 12  # windows before and after the checkpoint, rows per window
QLORA = ("lora.r=3", "lora.alpha=6", "model.load_in_4bit=true")
DECAY = ("training.weight_decay=0.1",)  # two groups of parameters


@dataclass(frozen=True)
class Case:
    stage: int
    offload: bool = False
    overrides: tuple[str, ...] = ()
    precision: str = "no"


CASES = {  # ZeRO-3 last: transformers remembers it
    "ZeRO-1": Case(1, overrides=DECAY),
    "ZeRO-1, bf16": Case(1, precision="bf16"),  # an optimizer class of its own in DeepSpeed
    "ZeRO-2, offload": Case(2, True),
    "ZeRO-2, QLoRA": Case(2, overrides=QLORA),
    "ZeRO-3, bf16": Case(3, precision="bf16"),
    "ZeRO-3, offload": Case(3, True, DECAY),
}
FORGETFUL = "ZeRO-1"  # trained once more without the moments, to show that they matter


def started(case: Case, recipe_path: str, clipping: float):
    """An engine of the case with fresh weights, in the process group that is there."""
    optimizer, parameters = "cpu" if case.offload else "none", "cpu" if case.offload and case.stage == 3 else "none"
    os.environ |= {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(case.stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": optimizer,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": parameters,
        "ACCELERATE_MIXED_PRECISION": case.precision,
    }
    strategy = replace(
        from_environment(os.environ, launched_by()[1]),
        zero_stage=case.stage,
        offload_optimizer=optimizer,
        offload_param=parameters,
        mixed_precision=case.precision,
    )
    engine = start_engine(EngineSettings(strategy, 2, 2, clipping))
    loaded = load_recipe(recipe_path, case.overrides)
    network = load_model(loaded, strategy, read_facts(loaded), engine.device)
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
    return engine


def train(engine, windows: range) -> list[float]:
    """The loss of every window, over all ranks. A window's rows are a function of its number."""
    losses = []
    for window in windows:
        random = np.random.default_rng(window)
        rows = random_rows(random, ROWS, 449)
        batches = [
            padded([rows[i] for i in part], 0)
            for part in split_into_micro_batches(range(ROWS), engine.ranks, 2)[engine.rank]
        ]
        (tokens,) = engine.all_reduce_sum(sum(batch.trained_tokens for batch in batches))
        loss = sum(engine.micro_step(batch, tokens, last=k == len(batches) - 1) for k, batch in enumerate(batches))
        losses.append(engine.all_reduce_sum(loss)[0] / tokens)
    return losses


def state_of(engine) -> dict[str, torch.Tensor]:
    """Whole float32 weights, both moments, and this rank's step of every group. A collective."""
    state = dict(engine.full_state_dict(only_trained=True))
    zero = engine.optimizer.optimizer
    # DeepSpeed links the groups after the first to their state never
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.inner_model().named_parameters():
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).detach().clone().view(-1)
    state["steps"] = torch.tensor(sorted({float(values["step"]) for values in zero.optimizer.state.values()}))
    return state


def unequal(state: dict, dump: dict, rank: int) -> list[str]:
    """Names of what is not the same, bit for bit; weights are whole on rank 0 only."""
    assert rank != 0 or state.keys() == dump.keys()
    return sorted(name for name in state if not torch.equal(state[name].view(-1), dump[name].view(-1)))


def train_and_save(case: Case, recipe_path: str, root: Path) -> dict:
    """Whole state at the checkpoint, and the losses of the windows after it."""
    engine = started(case, recipe_path, clipping=1.0)
    train(engine, range(BEFORE))
    assert not checkpoint.save(
        engine, root, Progress(Position(step=BEFORE, window=BEFORE)), {"ranks": engine.ranks}, 1, False, 0
    )
    state = state_of(engine)
    losses = train(engine, range(BEFORE, BEFORE + AFTER))
    engine.release()
    return {"state": state, "losses": losses}


def load_and_train(case: Case, recipe_path: str, root: Path, then: dict, forget: bool = False) -> dict:
    """What came back differently, and the losses of the windows after the checkpoint. `forget`: without its moments."""
    engine = started(case, recipe_path, clipping=0.5)
    found = checkpoint.choose(engine, root, print)
    fresh = dict(engine.full_state_dict(only_trained=True))
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    checkpoint.load(engine, found)
    result = {
        "fresh": [name for name, weight in fresh.items() if torch.equal(weight, then["state"][name])],
        "unequal": unequal(state_of(engine), then["state"], engine.rank),
        "clipping": engine.optimizer.optimizer.clip_grad,
        "settings": (
            settings == [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
        ),
        "damage": snapshots.verify(found.folder),
        "left": sorted(path.name for path in root.iterdir()),
    }
    if forget:
        for values in engine.optimizer.optimizer.optimizer.state.values():
            values["exp_avg"].zero_()
            values["exp_avg_sq"].zero_()
    engine.optimizer.optimizer.clip_grad = engine.max_grad_norm = 1.0
    result["losses"] = train(engine, range(BEFORE, BEFORE + AFTER))
    engine.release()
    return result


def main() -> None:
    recipe_path, folder = sys.argv[1], Path(sys.argv[2])
    rank, ranks = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
    torch.set_num_threads(1)
    prepare_libraries()
    results = {}
    for name, case in CASES.items():
        root, dump = folder / name, folder / f"{name}.pt"
        if root.exists():
            then = torch.load(dump)
            results[name] = load_and_train(case, recipe_path, root, then) | {"losses then": then["losses"]}
            if name == FORGETFUL:
                results["without moments"] = load_and_train(case, recipe_path, root, then, forget=True)
        else:
            then = train_and_save(case, recipe_path, root)
            results[name] = {"zero": [key for key, value in then["state"].items() if not value.any()]}
            if rank == 0:
                torch.save(then, dump)
    if rank == 0:
        (folder / f"{ranks} ranks.json").write_text(json.dumps(results))


main()
