"""Run under a launcher: what of an engine's state arrives on another number of ranks. Writes one JSON file.

Arguments: recipe.yaml folder. The first launch on a folder trains every case for a few windows, saves it, and dumps its whole float32
weights and moments. Later launches load each checkpoint and compare bit for bit with the dump.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
sys.path.insert(1, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from random_rows import random_rows

from finetune import checkpoint, data, launch, model, recipe, snapshots
from finetune.backend import engine as backend
from finetune.backend.parents import launched_by
from finetune.backend.probe import prepare_libraries
from finetune.checkpoint import Progress
from finetune.objectives import SummedLoss, trained_tokens
from finetune.optim import make_optimizer
from finetune.windows import Position, deal

WINDOWS, ROWS = 3, 12
LORA, DECAY = ("lora.r=3", "lora.alpha=6"), ("training.weight_decay=0.1",)  # decay: two groups of parameters


@dataclass(frozen=True)
class Case:
    stage: int
    offload: bool = False
    overrides: tuple[str, ...] = ()
    precision: str = "no"


CASES = {  # ZeRO-3 last: transformers remembers it
    "ZeRO-1": Case(1, overrides=DECAY),
    "ZeRO-1, bf16": Case(1, precision="bf16"),
    "ZeRO-2": Case(2),
    "ZeRO-2, bf16": Case(2, overrides=DECAY, precision="bf16"),
    "ZeRO-2, offload": Case(2, True, DECAY),
    "ZeRO-2, LoRA": Case(2, overrides=LORA),
    "ZeRO-2, QLoRA": Case(2, overrides=(*LORA, "model.load_in_4bit=true")),
    "ZeRO-3": Case(3, overrides=DECAY),
    "ZeRO-3, bf16": Case(3, precision="bf16"),
    "ZeRO-3, offload": Case(3, True, DECAY),
    "ZeRO-3, offload, LoRA": Case(3, True, LORA),
}


def started(case: Case, recipe_path: str, clipping: float):
    """An engine of the case with fresh weights, in the process group that is there."""
    optimizer, parameters = "cpu" if case.offload else "none", "cpu" if case.offload and case.stage == 3 else "none"
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(case.stage), "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": optimizer,
                   "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": parameters, "ACCELERATE_MIXED_PRECISION": case.precision}  # fmt: skip
    strategy = replace(launch.from_environment(os.environ, launched_by()[1]), zero_stage=case.stage, offload_optimizer=optimizer,
                       offload_param=parameters, mixed_precision=case.precision)  # fmt: skip
    engine = backend.start(strategy, 2, 2, clipping)
    loaded = recipe.load(recipe_path, case.overrides)
    network = model.load_model(loaded, strategy, model.facts(loaded), engine.device)
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe, strategy))
    return engine


def train(engine) -> None:
    random = np.random.default_rng(1)
    for _ in range(WINDOWS):
        rows = random_rows(random, ROWS, 449)
        batches = [data.collate([rows[i] for i in part], 0) for part in deal(range(ROWS), engine.ranks, 2)[engine.rank]]
        (tokens,) = engine.total(sum(map(trained_tokens, batches)))
        for k, batch in enumerate(batches):
            engine.micro_step(batch, tokens, last=k == len(batches) - 1)


def state_of(engine) -> dict[str, torch.Tensor]:
    """Whole float32 weights, both moments, and this rank's step of every group. A collective."""
    state = dict(engine.gather_state(only_trained=True))
    zero = engine.optimizer.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # DeepSpeed links the groups after the first to their state never
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.inner_model().named_parameters():
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).detach().clone().view(-1)
    state["steps"] = torch.tensor(sorted({float(values["step"]) for values in zero.optimizer.state.values()}))
    return state


def unequal(state: dict, dump: dict) -> list[str]:
    assert state.keys() == dump.keys()
    return sorted(name for name in dump if not torch.equal(state[name].view(-1), dump[name].view(-1)))


def run_case(name: str, case: Case, recipe_path: str, folder: Path) -> dict | None:
    """What was found, on rank 0."""
    root, dump = folder / name, folder / f"{name}.pt"
    if not dump.exists():
        engine = started(case, recipe_path, clipping=1.0)
        train(engine)
        progress = Progress(Position(step=WINDOWS, window=WINDOWS))
        assert not checkpoint.save(engine, root, progress, {"ranks": engine.ranks}, 1, False, 0)
        state = state_of(engine)
        engine.wait()
        if engine.rank == 0:
            torch.save(state, dump)
        engine.release()
        return {"tensors": len(state), "empty": sorted(key for key, value in state.items() if not value.any())}
    engine = started(case, recipe_path, clipping=0.5)
    found = checkpoint.choose(engine, root, print)
    weights = engine.gather_state(only_trained=True)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    checkpoint.load(engine, found)
    state, then = state_of(engine), torch.load(dump)
    assert settings == [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    result = None
    if engine.rank == 0:
        result = {
            "differ before": len(unequal(then | weights, then)),
            "differ": unequal(state, then),
            "clipping": engine.optimizer.optimizer.clip_grad,
            "damage": snapshots.verify(found.folder),
            "left": sorted(path.name for path in root.iterdir()),
        }
    engine.release()
    return result


def main() -> None:
    recipe_path, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    prepare_libraries()
    results = {name: run_case(name, case, recipe_path, folder) for name, case in CASES.items()}
    if results["ZeRO-1"] is not None:
        ranks = int(os.environ["WORLD_SIZE"])
        (folder / f"{ranks} ranks.json").write_text(json.dumps(results))


main()
