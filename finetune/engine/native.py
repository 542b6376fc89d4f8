"""The kind of engine of one process and of DDP: torch's own optimizer step, state as safetensors and JSON.

The same functions as in deepspeed/kind.py: engine.py asks one of the two modules and knows no kind itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.engine import state
from finetune.engine.clipping import clip_on_cpu
from finetune.engine.devices import has_accelerator
from finetune.engine.settings import EngineSettings, Prepared
from finetune.model.parameters import Weights


def accelerator_options(settings: EngineSettings, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What Accelerator is given for this kind; `steps` is the configured accumulation."""
    # with two CPU ranks and without it, accelerate 1.15 counts two processes and wraps nothing
    return {"cpu": None if has_accelerator() else True}


def size_buffers(prepared: Prepared, weights: Weights) -> None:
    """Size the engine's buffers for these parameters: DDP's buckets need none."""


def configuration(prepared: Prepared) -> dict | None:
    """The engine's effective configuration; None where it has none."""
    return None


def without_reduction(prepared: Prepared) -> contextlib.AbstractContextManager:
    """Around a micro-batch that does not end its window."""
    return prepared.accelerator.no_sync(prepared.module)


def end_window(prepared: Prepared) -> tuple[float, bool]:
    """Clip, step and clear the gradients; the norm before clipping, and whether the step was applied."""
    accelerator = prepared.accelerator
    norm = _clip(prepared)
    applied = False
    if accelerator.scaler is not None or math.isfinite(norm):
        prepared.optimizer.step()
        applied = not accelerator.optimizer_step_was_skipped
    _clear_gradients(prepared)
    return norm, applied


def warm_up_buckets(prepared: Prepared, inputs: dict[str, Any]) -> None:
    """Have DDP rebuild its buckets, by a backward of zero, before the first window."""
    if prepared.strategy.engine == "ddp":
        # the second leaves the gradients in the rebuilt buckets, or a resumed window would have them twice
        for _ in range(2):
            (prepared.module(inputs) * 0.0).backward()
        _clear_gradients(prepared)


def loss_scale(prepared: Prepared) -> float:
    """What fp16's scaler multiplies a loss with now; 1 without one."""
    scaler = prepared.accelerator.scaler
    return float(scaler.get_scale()) if scaler is not None else 1.0


def full_parameter(parameter: nn.Parameter, keep: bool) -> Tensor | None:
    """The whole parameter on the CPU; None where `keep` is false."""
    return parameter.detach().to("cpu", copy=True) if keep else None


def save(prepared: Prepared, folder: Path) -> list[str]:
    """Write this rank's part of the state into `folder`; returns the names of its files. Raises OSError."""
    return state.save(prepared, folder) if prepared.accelerator.is_main_process else []


def load(prepared: Prepared, folder: Path) -> None:
    """Read what `save` wrote, on every rank."""
    state.load(prepared, folder)


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained parameters that `save` wrote, whole, by their names in the model. No process group."""
    return state.read_trained(folder)


def release(prepared: Prepared) -> None:
    """Free what accelerate keeps of this kind beyond its own lists."""


def _clip(prepared: Prepared) -> float:
    parameters = list(prepared.module.parameters())
    if prepared.accelerator.device.type == "cpu":
        return float(clip_on_cpu(parameters, prepared.max_grad_norm))
    return float(prepared.accelerator.clip_grad_norm_(parameters, prepared.max_grad_norm or math.inf))


def _clear_gradients(prepared: Prepared) -> None:
    # DDP's buckets are there all the time, and gradients that were taken away would be added up beside them: a second
    # copy
    prepared.optimizer.zero_grad(set_to_none=prepared.strategy.engine != "ddp")
