"""Exactness cases of scripts/benchmarks/gpu_suite/run.py: accumulation against one batch, resume after kill -9, fp16
with an overflow.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from scripts.benchmarks.exactness import measure as measure_launch
from scripts.benchmarks.exactness import worst
from scripts.benchmarks.gpu_suite.setup import Setup, launched
from tests.support.exact_table import AGAINST_FLOAT32, KINDS, Launch
from tests.support.launch import TRAIN, accelerate, environment, launch_file
from tests.support.resume_table import KILLED, KILLED_AT, Run, differences, logged, overrides_of
from tests.support.tiny_models import small_recipe

SEED = 5
REPORTED = ("AdamW, epsilon 1e-8",)  # amplifies rounding where gradients are next to nothing: no limit
NAMES = {
    "gradient": "gradient against one float32 batch",
    "same engine": "gradient against one batch of the same engine",
    "SGD": "weights after 4 SGD steps",
    "AdamW, epsilon 1e-6": "weights after 4 AdamW steps, epsilon 1e-6",
    "AdamW, epsilon 1e-8": "weights after 4 AdamW steps, epsilon 1e-8",
}
# times larger embeddings make gradients of about 2.5: the loss scaler's 2^16 is too much for fp16, 2^12 is not
HOT = 100.0
HOT_STEPS = 8


def figure(what: str, value: float, limit: float | None = None) -> dict:
    """One number and the most it may be."""
    return {"what": what, "value": value, "limit": limit}


def one_batch(setup: Setup, folder: Path, engine: str) -> list[dict]:
    """tests/programs/exactness.py in float32: ragged windows of many K under this engine on one rank, and without
    one.
    """
    found = measure_launch(
        Launch(engine, "no", 1),
        small_recipe(folder / "recipe"),
        folder,
        SEED,
        0,
        use_cpu=setup.small,
        report=not setup.small,
    )
    figures = []
    for kind in KINDS:
        for name, value in worst([found], engine, "no", kind).items():
            figures.append(figure(f"{kind}: {NAMES[name]}", value, None if name in REPORTED else AGAINST_FLOAT32["no"]))
    return figures


def verify(setup: Setup, folder: Path, layout: dict) -> list[dict]:
    """`finetune verify` in bf16: relative difference of every window's gradient, against its own tolerance."""
    config = launch_file(folder / "launch.yaml", **setup.launch | layout | {"precision": "bf16"})
    command = [
        sys.executable,
        "-m",
        "finetune",
        "verify",
        small_recipe(folder / "recipe"),
        "--json",
        "--launch",
        config,
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(f"finetune verify ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return [
        figure(
            f"gradient, {case['name']} (K = {case['micro_batches']})", case["gradient_difference"], case["tolerance"]
        )
        for case in json.loads(done.stdout)["cases"]
    ]


def resume(setup: Setup, folder: Path) -> list[dict]:
    """A run killed by SIGKILL and started again, against one that nobody disturbed: losses and weights, bit for bit."""
    kind = Run({}) if setup.small else Run({}, ("training.deterministic=true",))
    recipe = small_recipe(folder / "recipe")
    config, given = launch_file(folder / "launch.yaml", **setup.launch), overrides_of(kind, recipe, folder)
    whole, broken = folder / "whole", folder / "broken"
    launched(config, TRAIN, recipe, *given, f"output_dir={whole}")
    accelerate(config, *KILLED, str(KILLED_AT), recipe, *given, f"output_dir={broken}")
    reached = max(row["step"] for row in logged(broken))
    launched(config, TRAIN, recipe, *given, f"output_dir={broken}")
    found = differences(broken, whole)
    print("\n".join(found))
    resumed = json.loads((broken / "run.json").read_text())["resumed_from_step"]
    return [
        figure(f"numbers that differ after a kill in step {reached} and a resume from step {resumed}", len(found), 0)
    ]


def fp16_overflow(setup: Setup, folder: Path) -> list[dict]:
    """fp16 with gradients that the loss scaler's first scale is too large for: windows are skipped and said so, and it
    goes on.
    """
    recipe = small_recipe(folder / "recipe")
    heat(recipe.parent / "base")
    config = launch_file(folder / "launch.yaml", **setup.launch | {"precision": "fp16"})
    launched(
        config,
        TRAIN,
        recipe,
        f"training.max_steps={HOT_STEPS}",
        f"output_dir={folder / 'run'}",
        "training.stop_on_loss_spike=false",
    )
    rows = [row for row in logged(folder / "run") if "loss" in row]
    applied = [row["applied"] for row in rows]
    first = applied.index(True)
    wrong = [row for row in rows if row["applied"] and not math.isfinite(row["loss"] + row["grad_norm"])]
    status = json.loads((folder / "run" / "run.json").read_text())["status"]
    return [
        figure("windows skipped before the first step (at least one is wanted)", first),
        figure("runs without a skipped window", int(first == 0), 0),
        figure("windows skipped after it", applied[first:].count(False)),
        figure(f"steps missing of {HOT_STEPS}", HOT_STEPS - sum(applied), 0),
        figure("applied windows whose loss or norm is not finite", len(wrong), 0),
        figure("runs that did not end well", int(status != "done"), 0),
    ]


def heat(model: Path) -> None:
    """Multiply the embeddings of a model folder, which are its head, too."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(HOT)
    network.save_pretrained(model)
