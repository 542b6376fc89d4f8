"""All that is special about DeepSpeed. Imported by the engine; imports deepspeed only inside functions."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.engine.deepspeed.buffers import derive_settings, fill_in
from finetune.engine.devices import check_compile_locks, has_accelerator
from finetune.launch.strategy import Strategy
from finetune.model.parameters import Weights


def make_plugin(strategy: Strategy, accumulation_steps: int, per_device_rows: int, max_grad_norm: float, say):
    """accelerate's DeepSpeedPlugin from the launch environment, with the recipe's knobs written in.

    The knobs must be in before `prepare`: accelerate reads "auto" clipping as 1.0 and takes the micro-batch size from a
    data loader that we do not prepare."""
    check_compile_locks()
    announce_compiles(strategy, say)
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.gradient_accumulation_steps = accumulation_steps
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = per_device_rows
    config["gradient_accumulation_steps"] = accumulation_steps
    config["gradient_clipping"] = float(max_grad_norm)
    config["zero_force_ds_cpu_optimizer"] = False  # the optimizer is ours to choose (kernels.py), SGD included
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


def size_buffers(plugin, weights: Weights, strategy: Strategy) -> None:
    """Cut DeepSpeed's buffers to the model (memory/zero_settings.py), in its configuration; what is set there already
    stands.

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


def effective_configuration(engine) -> dict:
    """What DeepSpeed's engine runs with, the defaults of its ZeRO section written out; JSON holds it."""
    # infinite, so that it prints nothing
    config = {key: value for key, value in engine.config.items() if key != "steps_per_print"}
    return json.loads(
        json.dumps(config | {"zero_optimization": engine._config.zero_config.model_dump(mode="json")}, default=str)
    )


def op_is_built(name: str) -> bool:
    """Whether one of DeepSpeed's C++ ops has been compiled on this machine before."""
    from torch.utils.cpp_extension import _get_build_directory

    return (Path(_get_build_directory(name, verbose=False)) / f"{name}.so").exists()


def announce_compiles(strategy: Strategy, say) -> None:
    """Say which C++ ops DeepSpeed is going to compile, once per machine: minutes of silence otherwise."""
    ops = [] if has_accelerator() or strategy.ranks == 1 else ["deepspeed_shm_comm"]
    ops += ["cpu_adam"] if strategy.offload_optimizer != "none" else []
    ops += ["async_io"] if "nvme" in (strategy.offload_optimizer, strategy.offload_param) else []
    missing = [op for op in ops if not op_is_built(op)]
    if missing:
        say(f"DeepSpeed compiles {', '.join(missing)} once on this machine; this takes a minute or two each ...")


def cpu_adam(groups: list[dict], **settings) -> torch.optim.Optimizer:
    """DeepSpeed's CPU Adam in AdamW mode, for optimizer states in host memory."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    _correct_bias_in_double(optimizer)
    return optimizer


def _correct_bias_in_double(optimizer: torch.optim.Optimizer) -> None:
    """Take Adam's bias correction out of DeepSpeed's C++ op, which subtracts beta^t from 1 in float32.

    With beta2 0.999 that costs up to 7e-6 of the step size in the first steps, enough to see in the losses. With r =
    sqrt(1 - b2^t), lr / (1 - b1^t) * m / (sqrt(v) / r + eps) is (lr * r / (1 - b1^t)) * m / (sqrt(v) + eps * r): the
    learning rate and epsilon carry the correction. Hooks and not a subclass, because ZeRO-3 asks for this very type.
    """
    names = ("lr", "eps", "weight_decay", "bias_correction")
    kept: list[dict] = []

    def before(optimizer, args, kwargs) -> None:
        kept[:] = [{name: group[name] for name in names} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            beta1, beta2 = torch.tensor(group["betas"], dtype=torch.float32).tolist()  # what the op computes with
            step = 1 + max(
                (optimizer.state[p].get("step", 0) for p in group["params"] if p in optimizer.state), default=0
            )
            root = math.sqrt(1 - beta2**step)
            factor = root / (1 - beta1**step)
            group.update(
                lr=group["lr"] * factor,
                eps=group["eps"] * root,
                bias_correction=False,
                weight_decay=group["weight_decay"] / factor,
            )

    def after(optimizer, args, kwargs) -> None:
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def whole_parameter(parameter: nn.Parameter, keep: bool) -> Tensor | None:
    """The whole parameter on the CPU, its float32 master where one exists. A collective: every rank calls it.

    Returns None where `keep` is false, so that only one rank pays for the copy.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        value = safe_get_full_fp32_param(parameter)
        return value.detach().to("cpu", copy=True) if keep and value is not None else None
    gather = zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext()
    with gather:
        return parameter.detach().to("cpu", copy=True) if keep else None


def drop_gradients(optimizer) -> None:
    """Clear what a skipped step leaves behind.

    DeepSpeed 0.19.8 empties its gradient buffers after a step, and after a skipped one all but those of ZeRO-1 and 2
    with CPU offload and a float32 buffer: one window that is not finite would spoil every later one."""
    if getattr(optimizer, "cpu_offload", False) and isinstance(
        gradients := getattr(optimizer, "averaged_gradients", None), dict
    ):
        gradients.update(dict.fromkeys(gradients))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, so that relative names do: DeepSpeed takes paths for glob patterns and regular expressions, and
    an output_dir with [, ] or + would match nothing."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def only_known_pickles() -> Iterator[None]:
    """Within it torch.load builds tensors, plain containers and these few classes of DeepSpeed, and calls nothing else.

    DeepSpeed's shards are pickles, which it loads with weights_only=False: whoever could forge a checkpoint could run
    code. TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, torch's own switch, turns this off."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") not in ("1", "y", "yes", "true"):  # what torch takes for on
        os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def read_shards(folder: Path, tag: str) -> dict[str, Tensor]:
    """Trained parameters in folder/tag, whole and float32, by their names in the engine's module. Needs no process
    group.
    """
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with only_known_pickles(), inside(folder), quiet[0], quiet[1]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(".", tag, exclude_frozen_parameters=True))


def destroy(accelerator) -> None:
    """Free accelerate's DeepSpeed engine so that the next `prepare` is not sent to it (it keeps only the first)."""
    accelerator.deepspeed_engine_wrapped.engine.destroy()
    accelerator.deepspeed_engine_wrapped = None
    accelerator._models.clear()
    accelerator._optimizers.clear()
