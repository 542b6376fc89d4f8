#!/usr/bin/env python3
"""Train a tiny model with DeepSpeed's ZenFlow through this project's engine and set its updates against one big batch.

    python -m scripts.benchmarks.zenflow [--versions 0.18.5,0.19.0,0.19.8] [--out docs/benchmarks/zenflow.md]

One CPU rank, float32, AdamW, ZenFlow without overlap, 10 % of the columns selected. The engine has no setting for
ZenFlow: this script writes the section into accelerate's plugin. Other versions than the installed one go to a
temporary folder (minutes each)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from finetune.data.collate import collate
from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.model import load as model
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from finetune.training.one_batch_reference import Reference, accumulate, change, relative

ROOT = Path(__file__).resolve().parents[2]

ROWS, WINDOWS, RATE = 2, 4, 1e-3  # rows per micro-batch; windows; learning rate
SETTINGS = ("training.learning_rate=1e-3", "training.adam_epsilon=1e-6")
PARAMETERS = {"lr": RATE, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0}
# name: (micro-batches per window, ZenFlow's update_interval (0: off), optimizer section (None: and our optimizer),
# layout mended)
CASES = {
    "without ZenFlow, K = 2": (2, 0, False, False),
    "K = 2, no `optimizer` section": (2, 2, False, False),
    "K = 2, our optimizer beside the section": (2, 2, None, False),
    "K = 1": (1, 1, True, False),
    "K = 2": (2, 2, True, False),
    "K = 4": (4, 4, True, False),
    "K = 1, layout mended": (1, 1, True, True),
    "K = 2, layout mended": (2, 2, True, True),
    "K = 4, layout mended": (4, 4, True, True),
}


def mend_layout(optimizer) -> None:
    """Show the model its weights as ZenFlow has stored them: transposed, one matrix after the other."""

    def update(self, group: int) -> None:
        names = ("round_robin_bit16_groups", "round_robin_bit16_meta", "round_robin_bit16_offsets")
        for parameter, meta, offset in zip(*(getattr(self, name)[group] for name in names), strict=True):
            part = self.bit16_groups_flat[group].narrow(0, offset, meta.numel())
            parameter.data = part.view(meta.shape[::-1]).t() if meta.ndim == 2 else part.view(meta.shape)

    optimizer._update_model_bit16_weights = update


def live(engine) -> dict[str, Tensor]:
    """What the forward computes with, not the optimizer's copy."""
    return {n: p.detach().float().clone() for n, p in engine.inner_model().named_parameters()}


def run(name: str, recipe_path: str, strategy) -> dict:
    """One case: weights after `prepare` against those loaded, and each window's update against that of one big
    batch.
    """
    from accelerate.utils import DummyOptim
    from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from transformers.integrations import unset_hf_deepspeed_config

    from tests.programs.random_rows import random_rows

    micro_batches, interval, section, mended = CASES[name]
    ZenFlowZeroOptimizer._update_model_bit16_weights = DeepSpeedZeroOptimizer._update_model_bit16_weights
    if mended:
        mend_layout(ZenFlowZeroOptimizer)
    loaded = load_recipe(recipe_path, SETTINGS)
    engine = start_engine(EngineSettings(strategy, micro_batches, ROWS, 1.0))
    config = engine.accelerator.state.deepspeed_plugin.deepspeed_config
    if interval:
        config["zero_optimization"]["zenflow"] = {
            "topk_ratio": 0.1,
            "select_strategy": "step",
            "select_interval": 8,
            "update_interval": interval,
            "overlap_step": False,
        }
    if section is not False:
        config["optimizer"] = {"type": "AdamW", "params": PARAMETERS}
    network = model.load_model(loaded, strategy, model.facts(loaded), engine.device)
    optimizer = (
        DummyOptim(list(network.parameters())) if section else make_optimizer(network, loaded.recipe.training, strategy)
    )
    engine.prepare(SummedLoss(network), optimizer)
    zero3 = strategy.zero_stage == 3
    states, exported, norms = [] if zero3 else [live(engine)], engine.full_state_dict(only_trained=True), []
    rows = random_rows(np.random.default_rng(5), ROWS * micro_batches * WINDOWS, model.facts(loaded).vocabulary)
    for first in range(0, len(rows), ROWS * micro_batches):
        window = rows[first : first + ROWS * micro_batches]
        accumulate(engine, [collate(window[i : i + ROWS], 0) for i in range(0, len(window), ROWS)])
        states.append(live(engine))
        norms.append(engine.grad_norm())
    engine.release()
    unset_hf_deepspeed_config()
    reference = Reference(loaded, model.facts(loaded))
    matrices = {n: t for n, t in reference.state().items() if t.ndim == 2}
    found = {
        "start": relative(states[0], matrices),
        "exported": relative(exported, matrices),
        "updates": [],
        "norms": [],
    }
    for w, norm in enumerate(norms):
        reference.load(states[w])
        true_norm = reference.step(rows[w * ROWS * micro_batches : (w + 1) * ROWS * micro_batches])[1]
        found["updates"].append(relative(change(states[w], states[w + 1]), change(states[w], reference.state())))
        found["norms"].append(norm / true_norm)
    moved = torch.cat([(states[1][n] - states[0][n]).abs().flatten() for n in matrices])
    return found | {"first_step": float(moved.median()) / RATE}


def attempt(name: str, recipe_path: str, strategy) -> dict:
    """The case's result, or how it failed: that is a result too."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations import unset_hf_deepspeed_config

    try:
        return run(name, recipe_path, strategy)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        AcceleratorState._reset_state()  # also after a crash the next case gets an engine of its own
        GradientState._reset_state()
        unset_hf_deepspeed_config()


def child(recipe_path: str, out: str) -> None:
    """Under the launcher: every case of this version and stage."""
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = from_environment(os.environ, launched_by()[1])
    names = ["K = 2"] if strategy.zero_stage == 3 else list(CASES)
    if Version(importlib.metadata.version("deepspeed")) < Version("0.19.8"):  # what there is to mend came later
        names = ["without ZenFlow, K = 2", "K = 1", "K = 2"]
    Path(out).write_text(json.dumps({name: attempt(name, recipe_path, strategy) for name in names}))


def measure(version: str, stage: int, folder: Path) -> dict:
    """What the cases came to under this DeepSpeed version and ZeRO stage."""
    from scripts.benchmarks.deepspeed_versions import install
    from tests.support.launch import accelerate, launch_file
    from tests.support.tiny_models import small_recipe

    env = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    if version != importlib.metadata.version("deepspeed"):
        if not (folder / version).exists() and (reason := install(version, folder / version)):
            sys.exit(reason)
        env |= {
            "PYTHONPATH": f"{folder / version}:{ROOT}",
            "TORCH_EXTENSIONS_DIR": str(folder / f"extensions-{version}"),
        }
    config, out = launch_file(folder / "launch.yaml", 1, stage, "cpu"), folder / f"{version}-{stage}.json"
    done = accelerate(
        config, Path(__file__).resolve(), "--case", small_recipe(folder / "recipe"), out, env=env, timeout=560
    )
    return json.loads(out.read_text()) if done.returncode == 0 else sys.exit(done.stderr[-3000:])


def cells(case: dict) -> str:
    """A case as the last four columns of the table."""
    if "error" in case:
        return f"{case['error']} | - | - | - | -"

    def span(values: list[float], form: str) -> str:
        return "NaN" if any(v != v for v in values) else f"{min(values):{form}} to {max(values):{form}}"

    first = case["first_step"]
    return (
        f"{case['start']:.2f} | {case['exported']:.2f} | {span(case['updates'], '.2f')} | {span(case['norms'], '.3f')}"
        f" | {'NaN' if first != first else f'{first:.2f}'}"
    )


def page(found: dict[tuple[str, int], dict]) -> str:
    """The table as Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("accelerate", "torch", "transformers")
    )
    lines = [
        "<!-- Written by scripts/benchmarks/zenflow.py. -->",
        "# ZenFlow through accelerate's wrapper",
        "",
        f"With {versions}; one CPU rank, float32, CPU offload, {WINDOWS} windows of AdamW.",
        "",
        (
            "| DeepSpeed, ZeRO stage | case | matrices at the start | as gathered for export | update against one batch"
            " | gradient norm / true | first step of a weight / learning rate |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for (version, stage), cases in found.items():
        lines += [f"| {version}, {stage} | {name} | {cells(case)} |" for name, case in cases.items()]
    notes = [
        (
            "Matrices, updates: relative L2 difference, the least and the greatest of the windows. The first step is"
            " the median"
        ),
        "over all elements of all matrices after the first window; Adam's first step is one learning rate.",
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    if "--case" in sys.argv:
        return child(*sys.argv[-2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    installed = importlib.metadata.version("deepspeed")
    parser.add_argument(
        "--versions", default=installed, help=f"separated by commas (default: the installed one, {installed})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "zenflow.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zenflow-") as folder:
        stages = {v: (2, 3) if v == installed else (2,) for v in arguments.versions.split(",")}
        found = {(v, stage): measure(v, stage, Path(folder)) for v, few in stages.items() for stage in few}
    arguments.out.write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
