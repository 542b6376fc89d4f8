"""Starts Accelerate for a strategy, and refuses a world that is not the one asked for."""

from __future__ import annotations

import contextlib
import datetime
import io
from collections.abc import Callable
from dataclasses import replace

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from finetune.engine.devices import has_accelerator
from finetune.engine.engine import Engine
from finetune.engine.kinds import KINDS
from finetune.engine.settings import TIMEOUT_SECONDS, EngineSettings
from finetune.errors import UserError
from finetune.launch.launcher_command import HOW_TO_START_RANKS
from finetune.launch.strategy import Strategy


def start_engine(settings: EngineSettings, say: Callable[[str], None] = print) -> Engine:
    """Start Accelerate. Raises UserError when the world that came up is not the one that was asked for."""
    strategy, kind = settings.strategy, KINDS[settings.strategy.engine]
    settings = replace(settings, timeout_seconds=max(TIMEOUT_SECONDS, settings.timeout_seconds))
    # at least 2: with 1, DeepSpeed steps and reduces on every micro-batch whatever the boundary flag says
    steps = max(2, settings.accumulation_steps)
    options = kind.accelerator_options(settings, steps, say)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if strategy.engine != "single":  # in a plain single process it crashes
        timeout = datetime.timedelta(seconds=settings.timeout_seconds)
        # without gloo each DeepSpeed rank on a CPU believes it is alone
        handlers.append(InitProcessGroupKwargs(backend=None if has_accelerator() else "gloo", timeout=timeout))
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints that its op was built, on every rank
        accelerator = Accelerator(
            mixed_precision=strategy.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False),
            kwargs_handlers=handlers,
            **options,
        )
    check_world(strategy, accelerator.num_processes)
    if strategy.ranks > 1 and accelerator.distributed_type == DistributedType.NO:
        raise UserError(
            f"launch: accelerate {accelerate.__version__} started {strategy.ranks} ranks that would train alone"
            " (distributed_type NO). Use one of the files in accelerate_configs/."
        )
    return Engine(accelerator, strategy, settings.max_grad_norm, kind)


def check_world(strategy: Strategy, accelerate_ranks: int) -> None:
    """Ranks of the launch, seen by accelerate and seen by torch must agree. Raises UserError with advice."""
    torch_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not accelerate_ranks == torch_ranks == strategy.ranks:
        raise UserError(
            f"launch: {strategy.ranks} processes were started, accelerate sees {accelerate_ranks}, torch sees"
            f" {torch_ranks}. {HOW_TO_START_RANKS}"
        )
