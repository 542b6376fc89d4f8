"""What an engine is configured with, and what Accelerate has prepared of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from finetune.launch.strategy import Strategy

TIMEOUT_SECONDS = 1800.0  # torch's and accelerate's own


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is configured with, once. `accumulation_steps`: about how many micro-batches windows have.

    A rank waits `timeout_seconds` for the others in a collective, and never less than TIMEOUT_SECONDS: longer than the
    watchdog, which knows what is wrong."""

    strategy: Strategy
    accumulation_steps: int
    per_device_rows: int
    max_grad_norm: float
    timeout_seconds: float = TIMEOUT_SECONDS


@dataclass
class Prepared:
    """What the functions of a kind of engine (native.py, deepspeed/kind.py) work on. `module` returns a micro-batch's
    summed loss; `optimizer` steps inside the last micro-step. Both are there after `Engine.prepare`.
    """

    accelerator: Accelerator
    strategy: Strategy
    max_grad_norm: float
    module: nn.Module = field(init=False, repr=False)
    optimizer: torch.optim.Optimizer = field(init=False, repr=False)

    def inner_model(self) -> nn.Module:
        """The Hugging Face (or peft) model inside the wrappers."""
        return self.accelerator.unwrap_model(self.module).model
