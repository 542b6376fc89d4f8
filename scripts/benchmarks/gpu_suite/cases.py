"""The cases of scripts/benchmarks/gpu_suite/run.py, in the order of their importance. Data only: a case's module is
imported in its own process.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchmarks.gpu_suite.setup import OFFLOAD, Setup

PREPARED = ("prepare models", "prepare CPU Adam")
NVME = OFFLOAD | {"offload_optimizer": "nvme", "offload_param": "nvme"}
PLAIN = {"training.gradient_checkpointing": False}
LORA = {"lora.r": 16, "lora.alpha": 32}


@dataclass(frozen=True)
class Case:
    """`function` ("module.name") with `how` as keywords gives the figures. It is started when `usual_seconds` (on a
    GPU) are left, and may take three times as much, or `limit`. Cases of one stage run together unless they need the
    device `alone`."""

    name: str
    function: str
    usual_seconds: float
    stage: int
    how: dict = field(default_factory=dict)
    alone: bool = False
    needs: tuple[str, ...] = PREPARED
    hidden: bool = False
    not_on_cpu: str = ""  # why it is no case of the small run
    limit: float | None = None

    @property
    def group(self) -> str:
        """The name's first word."""
        return self.name.partition(" ")[0].rstrip(":")

    def seconds(self, small: bool) -> float:
        """What must be left for it to start."""
        return 10.0 if small else self.usual_seconds

    def limit_seconds(self, small: bool) -> float:
        """After which it is ended."""
        return self.limit or max(300.0 if small else 60.0, 3 * self.usual_seconds)

    def run(self, setup: Setup, folder: Path) -> object:
        """Figures for JSON, in this process. Raises NotRun where it cannot run here, and whatever goes wrong."""
        module, _, name = self.function.rpartition(".")
        return getattr(importlib.import_module(module), name)(setup, folder, **self.how)


def memory(name: str, seconds: float, **how) -> Case:
    return Case(f"memory: {name}", "scripts.benchmarks.gpu_suite.memory.measure", seconds, 2, how, alone=True)


def exactness(name: str, function: str, seconds: float, stage: int = 0, not_on_cpu: str = "", **how) -> Case:
    needs = PREPARED if stage else ()  # offload waits for its op; nothing here takes the prepared models
    return Case(
        f"exactness: {name}",
        f"scripts.benchmarks.gpu_suite.exact.{function}",
        seconds,
        stage,
        how,
        needs=needs,
        not_on_cpu=not_on_cpu,
    )


def throughput(name: str, seconds: float, **layout) -> Case:
    return Case(
        f"throughput: {name}", "scripts.benchmarks.gpu_suite.speed.measure", seconds, 2, {"layout": layout}, alone=True
    )


CASES = {
    case.name: case
    for case in (
        Case("prepare models", "scripts.benchmarks.gpu_suite.setup.prepare_models", 20, 0, needs=()),
        Case("prepare CPU Adam", "scripts.benchmarks.gpu_suite.setup.prepare_op", 60, 0, needs=()),
        exactness("float32, one process", "one_batch", 30, engine="DDP"),
        exactness("bf16, verify, one process", "verify", 20, layout={}),
        exactness("resume after kill -9", "resume", 40),
        exactness("fp16 with overflow", "fp16_overflow", 20, not_on_cpu="not applicable: no loss scaler on the CPU"),
        exactness("float32, ZeRO-3 + CPU offload", "one_batch", 40, 1, engine="ZeRO-3 + CPU offload"),
        exactness("bf16, verify, ZeRO-3 + CPU offload", "verify", 25, 1, layout=OFFLOAD),
        memory("checkpointing, K = 1", 40),
        memory("no checkpointing, K = 1", 40, overrides=PLAIN),
        memory("checkpointing, K = 4", 40, steps=4),
        memory("ZeRO-3 + CPU offload", 50, layout=OFFLOAD),
        memory("LoRA", 30, overrides=LORA, model="large"),
        memory("QLoRA", 30, overrides=LORA | {"model.load_in_4bit": True}, model="large"),
        memory("ZeRO-2", 40, layout={"zero_stage": 2}),
        throughput("one process", 45),
        throughput("ZeRO-3 + CPU offload", 60, **OFFLOAD),
        memory("no checkpointing, K = 4", 40, overrides=PLAIN, steps=4),
        memory("LoRA, no checkpointing", 30, overrides=LORA | PLAIN, model="large"),
        memory("ZeRO-3 + NVMe offload", 120, layout=NVME),
        Case("selftest: hangs", "scripts.benchmarks.gpu_suite.setup.hang", 1, 3, needs=(), hidden=True, limit=5),
        Case("selftest: is killed", "scripts.benchmarks.gpu_suite.setup.die", 1, 3, needs=(), hidden=True),
    )
}
