"""A run's layout over hardware as one value: engine, ranks, precision, ZeRO stage, offload. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.report.text import count

Kind = Literal["single", "ddp", "deepspeed"]
Precision = Literal["no", "bf16", "fp16"]
Target = Literal["none", "cpu", "nvme"]
PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
TARGETS: tuple[Target, ...] = ("none", "cpu", "nvme")  # of offload
PRECISION_NAMES = {"no": "no mixed precision", "bf16": "bf16 mixed precision", "fp16": "fp16 mixed precision"}
ENGINE_NAMES = {"single": "one process", "ddp": "data parallel (DDP)"}


@dataclass(frozen=True)
class Strategy:
    """How a run is laid out over hardware: nothing here changes the resulting weights."""

    source: str  # the launch file's path, "environment" or "one process"
    engine: Kind
    ranks: int  # over all machines
    machines: int
    mixed_precision: Precision
    use_cpu: bool  # True: asked for the CPU; False: whatever device is there
    zero_stage: int = 0  # 0 without DeepSpeed
    offload_optimizer: Target = "none"
    offload_param: Target = "none"
    nvme_path: str | None = None
    gradient_accumulation_steps: int | None = None  # None: not given, or auto
    gradient_clipping: float | None = None  # the same

    @property
    def data_ranks(self) -> int:
        """Ranks that see different rows: what batch arithmetic counts."""
        return self.ranks

    @property
    def local_ranks(self) -> int:
        """Ranks of one machine."""
        return max(1, self.ranks // self.machines)

    def describe(self) -> str:
        """One line for people: engine, offload, ranks, precision."""
        parts = [ENGINE_NAMES.get(self.engine, f"DeepSpeed ZeRO-{self.zero_stage}")]
        offloaded = (("optimizer", self.offload_optimizer), ("parameters", self.offload_param))
        parts += [f"{what} on {where}" for what, where in offloaded if where != "none"]
        if self.engine != "single":
            parts.append(count(self.ranks, "rank"))
        if self.machines > 1:
            parts.append(f"{self.machines} machines")
        return ", ".join([*parts, PRECISION_NAMES[self.mixed_precision]])


def one_process(mixed_precision: Precision = "no", use_cpu: bool = False) -> Strategy:
    """The strategy of a plain `python finetune/train.py`."""
    return Strategy("one process", "single", 1, 1, mixed_precision, use_cpu)
