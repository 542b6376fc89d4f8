"""A run killed by SIGKILL and started again by the same command has the losses of an unbroken one, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch_support import ROOT, TRAIN, accelerate, launch_file
from tiny_models import chat_file, small_recipe

pytestmark = pytest.mark.slow

KILLED = ROOT / "tests/launched/killed_run.py"
STEPS, SAVED_EVERY, KILLED_AT = 20, 4, 14  # the last checkpoint before the kill is that of step 12
SAME = ("loss", "grad_norm", "learning_rate", "tokens", "rows", "epoch", "gradient_accumulation_steps", "window", "total_tokens")
COMMON = (f"training.max_steps={STEPS}", f"checkpoint.save_steps={SAVED_EVERY}", "evaluation.eval_steps=6")
LORA = ("lora.r=4", "lora.alpha=8", "lora.dropout=0.1")
QLORA = LORA + ("model.load_in_4bit=true",)
OFFLOAD = dict(zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
ADAPTIVE = "accumulation={schedule: adaptive, smallest: 0.5, largest: 2, measure_every: 1}"
WARMUP = "accumulation={schedule: warmup, warmup: [[0.3, 0.25], [0.7, 0.5], [1.0, 1.0]]}"


@dataclass(frozen=True)
class Run:
    launch: dict
    overrides: tuple[str, ...] = ()


RUNS = {
    "one process, LoRA with dropout, adaptive": Run(dict(ranks=1), (*LORA, ADAPTIVE)),
    "one process, QLoRA, 8-bit AdamW, bf16": Run(
        dict(ranks=1, precision="bf16"), (*QLORA[1:], "lora.r=256", "training.optim=adamw_8bit", "training.deterministic=true")
    ),
    "DDP on 2 ranks, weighted mixture, warm-up of the batch": Run(dict(ranks=2), ("MIXTURE", WARMUP)),
    "DDP on 3 ranks": Run(dict(ranks=3), ("training.global_batch_size=12",)),
    "ZeRO-2, bf16": Run(dict(ranks=2, zero_stage=2, precision="bf16"), ("training.deterministic=true",)),
    "ZeRO-3 with offload": Run(dict(ranks=2, **OFFLOAD), (ADAPTIVE,)),
    "ZeRO-3 with offload, LoRA, bf16": Run(dict(ranks=2, precision="bf16", **OFFLOAD), LORA),
    "ZeRO-1": Run(dict(ranks=2, zero_stage=1)),
    "one process, streaming": Run(dict(ranks=1), ("data.streaming=true", "data.eval=[{path: chat.jsonl}]")),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("resume"))


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_is_bitwise_the_unbroken_run(name, recipe, tmp_path):
    run = RUNS[name]
    overrides = [*COMMON, *run.overrides]
    if "MIXTURE" in overrides:
        other = chat_file(tmp_path / "other.jsonl", 30, seed=7)
        overrides.remove("MIXTURE")
        overrides.append(f"data.train=[{{path: {recipe.parent / 'chat.jsonl'}, weight: 1.5}}, {{path: {other}, weight: 0.5}}]")
    file = launch_file(tmp_path / "launch.yaml", **run.launch)
    cache = {"FINETUNE_CACHE": str(tmp_path / "cache")}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = accelerate(file, TRAIN, recipe, *overrides, f"output_dir={whole}", env=cache)
    assert done.returncode == 0, done.stderr[-4000:]
    killed = accelerate(file, KILLED, str(KILLED_AT), recipe, *overrides, f"output_dir={broken}", env=cache)
    assert killed.returncode != 0
    assert max(row["step"] for row in logged(broken)) == KILLED_AT
    assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == ["latest", "step-12", "step-8"]
    done = accelerate(file, TRAIN, recipe, *overrides, f"output_dir={broken}", env=cache)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming after step 12" in done.stderr
    ours, theirs = logged(broken), logged(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        keys = [key for key in SAME if key in other] if "loss" in other else ["eval_loss"]
        assert {key: mine[key] for key in keys} == {key: other[key] for key in keys}, other["step"]
    assert weights(broken) == weights(whole), "the exported files, byte for byte"


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))}
