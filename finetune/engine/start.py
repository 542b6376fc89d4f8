"""Starts Accelerate for a strategy, and refuses a world that is not the one asked for."""

from __future__ import annotations

import contextlib
import datetime
import io
from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from finetune.engine.deepspeed import config as ds
from finetune.engine.devices import has_accelerator
from finetune.engine.engine import Engine
from finetune.errors import UserError
from finetune.launch.launcher_command import HOW_TO_START_RANKS
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


def start_engine(settings: EngineSettings, say: Callable[[str], None] = print) -> Engine:
    """Start Accelerate. Raises UserError when the world that came up is not the one that was asked for."""
    strategy = settings.strategy
    # at least 2: with 1, DeepSpeed steps and reduces on every micro-batch whatever the boundary flag says
    configured = max(2, settings.accumulation_steps)
    timeout_seconds = max(TIMEOUT_SECONDS, settings.timeout_seconds)
    plugin = None
    if strategy.engine == "deepspeed":
        plugin = ds.make_plugin(strategy, configured, settings.per_device_rows, settings.max_grad_norm, say)
        ds.wait_at_least(timeout_seconds)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if strategy.engine != "single":  # in a plain single process it crashes
        timeout = datetime.timedelta(seconds=timeout_seconds)
        # without gloo each DeepSpeed rank on a CPU believes it is alone
        handlers.append(InitProcessGroupKwargs(backend=None if has_accelerator() else "gloo", timeout=timeout))
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints that its op was built, on every rank
        accelerator = Accelerator(
            # with two CPU ranks and without it, accelerate 1.15 counts two processes and wraps nothing; DeepSpeed is
            # dropped by it
            cpu=True if strategy.engine != "deepspeed" and not has_accelerator() else None,
            mixed_precision=strategy.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=configured, sync_with_dataloader=False),
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
    check_world(strategy, accelerator.num_processes)
    if strategy.ranks > 1 and accelerator.distributed_type == DistributedType.NO:
        raise UserError(
            f"launch: accelerate {accelerate.__version__} started {strategy.ranks} ranks that would train alone"
            " (distributed_type NO). Use one of the files in accelerate_configs/."
        )
    return Engine(accelerator, strategy, settings.max_grad_norm)


def check_world(strategy: Strategy, accelerate_ranks: int) -> None:
    """Ranks of the launch, seen by accelerate and seen by torch must agree. Raises UserError with advice."""
    torch_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not accelerate_ranks == torch_ranks == strategy.ranks:
        raise UserError(
            f"launch: {strategy.ranks} processes were started, accelerate sees {accelerate_ranks}, torch sees"
            f" {torch_ranks}. {HOW_TO_START_RANKS}"
        )
