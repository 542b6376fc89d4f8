"""DeepSpeed's configuration from launch file, recipe and model size: clipping, float32 gradient buffers, offload."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

from finetune.engine.deepspeed.buffers import derive_settings, fill_in
from finetune.engine.deepspeed.compile import announce_compiles, check_compile_locks
from finetune.engine.settings import EngineSettings
from finetune.launch.strategy import Strategy
from finetune.model.parameters import Weights


def make_plugin(settings: EngineSettings, accumulation_steps: int, say: Callable[[str], None]) -> Any:
    """accelerate's DeepSpeedPlugin from the launch environment, with the recipe's knobs written in.

    The knobs must be in before `prepare`: accelerate reads "auto" clipping as 1.0 and takes the micro-batch size from a
    data loader that we do not prepare."""
    strategy = settings.strategy
    check_compile_locks()
    announce_compiles(strategy, say)
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.gradient_accumulation_steps = accumulation_steps
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = settings.per_device_rows
    config["gradient_accumulation_steps"] = accumulation_steps
    config["gradient_clipping"] = float(settings.max_grad_norm)
    config["zero_force_ds_cpu_optimizer"] = False  # the optimizer is ours to choose (engine/optimizer.py), SGD included
    config["zero_allow_untested_optimizer"] = True
    for key, target in (("offload_optimizer", strategy.offload_optimizer), ("offload_param", strategy.offload_param)):
        if target == "nvme":  # accelerate does not hand the folder on; the strategy has it from the launch file
            config["zero_optimization"][key]["nvme_path"] = strategy.nvme_path
    if strategy.mixed_precision != "no":
        # a window's gradients are added up in float32: bf16 buffers lose bits with every micro-batch
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return plugin


def wait_at_least(seconds: float) -> None:
    """How long ranks wait for each other in DeepSpeed's own process groups, which it makes without saying: torch's
    defaults, with NCCL 10 minutes, whatever the first group was given."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = datetime.timedelta(seconds=seconds)


def size_buffers(plugin: Any, weights: Weights, strategy: Strategy) -> None:
    """Size DeepSpeed's buffers for the model (buffers.py), in its configuration; what is set there already stands.

    Before the weights are read: zero.Init makes the buffers through which parameters go to NVMe.
    """
    config = plugin.deepspeed_config
    fill_in(config["zero_optimization"], derive_settings(weights, strategy))
    if "nvme" in (strategy.offload_param, strategy.offload_optimizer):
        config.setdefault(
            "aio", {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}
        )
    if strategy.zero_stage == 3:
        plugin.set_deepspeed_weakref()  # zero.Init, which transformers calls, reads a copy


def effective_configuration(engine: Any) -> dict:
    """What DeepSpeed's engine runs with, the defaults of its ZeRO section written out; JSON holds it."""
    # infinite, so that it prints nothing
    config = {key: value for key, value in engine.config.items() if key != "steps_per_print"}
    return json.loads(
        json.dumps(config | {"zero_optimization": engine._config.zero_config.model_dump(mode="json")}, default=str)
    )


def destroy(accelerator: Any) -> None:
    """Free accelerate's DeepSpeed engine so that the next `prepare` is not sent to it (it keeps only the first)."""
    accelerator.deepspeed_engine_wrapped.engine.destroy()
    accelerator.deepspeed_engine_wrapped = None
    accelerator._models.clear()
    accelerator._optimizers.clear()
