"""The kind of engine of DeepSpeed ZeRO: accelerate's wrapper clips and steps inside the window's last backward.

The same functions as in ../native.py: engine.py asks one of the two modules and knows no kind itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.engine.deepspeed import checkpoint, config, parameters
from finetune.engine.settings import EngineSettings, Prepared
from finetune.model.parameters import Weights


def accelerator_options(settings: EngineSettings, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What Accelerator is given for this kind; `steps` is the configured accumulation."""
    config.wait_at_least(settings.timeout_seconds)
    # with cpu=True accelerate would drop DeepSpeed
    return {"cpu": None, "deepspeed_plugin": config.make_plugin(settings, steps, say)}


def size_buffers(prepared: Prepared, weights: Weights) -> None:
    """Size the engine's buffers for these parameters."""
    config.size_buffers(prepared.accelerator.state.deepspeed_plugin, weights, prepared.strategy)


def configuration(prepared: Prepared) -> dict | None:
    """The engine's effective configuration; None where it has none."""
    return config.effective_configuration(_engine(prepared))


def without_reduction(prepared: Prepared) -> contextlib.AbstractContextManager:
    """Around a micro-batch that does not end its window."""
    return contextlib.nullcontext()  # ZeRO-2 and 3 refuse no_sync; the boundary flag (sync_gradients) says the same


def end_window(prepared: Prepared) -> tuple[float, bool]:
    """The norm before clipping, and whether the step was applied: accelerate's backward has clipped and stepped."""
    engine = _engine(prepared)
    norm = float(prepared.accelerator.deepspeed_engine_wrapped.get_global_grad_norm())
    applied = bool(engine.was_step_applied())
    if not applied:
        parameters.drop_gradients(engine.optimizer)
    return norm, applied


def warm_up_buckets(prepared: Prepared, inputs: dict[str, Any]) -> None:
    """Have DDP rebuild its buckets before the first window: DeepSpeed does not rebuild its own."""


def loss_scale(prepared: Prepared) -> float:
    """What fp16's scaler multiplies a loss with now; 1 without one."""
    return float(_engine(prepared).optimizer.loss_scale) if prepared.strategy.mixed_precision == "fp16" else 1.0


def full_parameter(parameter: nn.Parameter, keep: bool) -> Tensor | None:
    """The whole parameter on the CPU; None where `keep` is false."""
    return parameters.full_parameter(parameter, keep)


def save(prepared: Prepared, folder: Path) -> list[str]:
    """Write this rank's part of the state into `folder`; returns the names of its files. Raises OSError."""
    return checkpoint.save(prepared, folder)


def load(prepared: Prepared, folder: Path) -> None:
    """Read what `save` wrote, on every rank."""
    checkpoint.load(prepared, folder)


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained parameters that `save` wrote, whole, by their names in the model. No process group."""
    return checkpoint.read_trained(folder)


def release(prepared: Prepared) -> None:
    """Free what accelerate keeps of this kind beyond its own lists."""
    config.destroy(prepared.accelerator)


def _engine(prepared: Prepared) -> Any:
    return prepared.accelerator.deepspeed_engine_wrapped.engine
