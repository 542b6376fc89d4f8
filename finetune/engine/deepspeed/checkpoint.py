"""DeepSpeed's shards on disk, and the same state made readable for any number of ranks: its universal checkpoint.

What DeepSpeed 0.19 needs for a universal checkpoint and does not say: `inject_missing_state` for ZeRO-1 and 2 (only
Megatron writes that state by itself), AdamW's two moments under their names, and paths without special characters,
since it uses them as patterns. The frozen base of LoRA is in neither folder: adapters and their moments are converted
like any other trained parameter."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.engine.settings import Prepared
from finetune.launch.strategy import Strategy

# on the disk together at most: fragments of all shards, the whole tensors made of them, one rank's shard
BYTES_FACTOR = 3
SHARDS = "deepspeed"  # the folder of the shards in a checkpoint
# what reading forged shards raises: DeepSpeed does not check what it reads
SHARD_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError)
_UNIVERSAL = "zero"  # a folder that DeepSpeed makes in universal checkpoints only
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def not_convertible(strategy: Strategy, optim: str) -> str:
    """Why DeepSpeed shards of this optimizer (training.optim) cannot go to another number of ranks, in words; "" if
    they can.
    """
    if optim != "adamw":
        return f"training.optim is {optim}, and DeepSpeed can only convert the state of adamw"
    if "nvme" in (strategy.offload_optimizer, strategy.offload_param):
        return "the launch file offloads to nvme, and DeepSpeed can only convert state that is in memory"
    return ""


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
    """While active, torch.load builds tensors, plain containers and these few classes of DeepSpeed, and calls nothing
    else.

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


def save(prepared: Prepared, folder: Path) -> list[str]:
    """Write this rank's shards into `folder`; returns the names of its files. A collective. Raises OSError."""
    engine: Any = prepared.module
    errors: list[OSError] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def save_or_keep_the_error(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk
            # the other ranks wait for this one at DeepSpeed's next barrier: go on, complain afterwards
            errors.append(error if isinstance(error, OSError) else OSError(f"{path}: {error}"))

    writer.save = save_or_keep_the_error
    # its conversion scripts are no state, and a full disk would stop rank 0 before the others' barrier
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
    finally:
        writer.save = write
        del engine._copy_recovery_script
    if errors:
        raise errors[0]
    names = sorted(str(path.relative_to(folder)) for path in (folder / SHARDS).rglob("*") if path.is_file())
    owner = {name: int(found[1]) if (found := _OF_RANK.search(name)) else 0 for name in names}
    return [name for name in names if owner[name] == prepared.accelerator.process_index]


def load(prepared: Prepared, folder: Path) -> None:
    """Read what `save` wrote on as many ranks, or what `convert` made of it. A collective."""
    engine: Any = prepared.module
    optimizer: Any = prepared.optimizer
    # DeepSpeed brings the groups' settings back with the state, under ZeRO-3 from a universal checkpoint those of the
    # first group for all, and its clipping; the recipe's stand, also where a change was allowed
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = (folder / SHARDS / _UNIVERSAL).is_dir()
    with only_known_pickles(), inside(folder):
        found, _ = engine.load_checkpoint(".", tag=SHARDS, load_module_strict=False, load_lr_scheduler_states=False)
    assert found is not None, f"DeepSpeed read nothing from {folder}"
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    optimizer.optimizer.clip_grad = prepared.max_grad_norm


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained parameters that `save` wrote, whole and float32, by their names in the model. No process group.

    Raises one of SHARD_ERRORS where the shards do not hold what DeepSpeed expects of them."""
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with only_known_pickles(), inside(folder), quiet[0], quiet[1]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        tensors = get_fp32_state_dict_from_zero_checkpoint(".", SHARDS, exclude_frozen_parameters=True)
        prefix = "model."  # of the summed-loss module that holds the model
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def convert(folder: Path, target: Path) -> None:
    """Write the shards in `folder`, whose hashes were compared before, as a universal checkpoint into the folder
    `target`.

    In this process, one rank's shards in memory at a time. `folder` is only read. Raises OSError.
    """
    from deepspeed.checkpoint import ds_to_universal

    source = os.path.relpath((folder / SHARDS).resolve(), target.resolve())
    with only_known_pickles(), inside(target):
        arguments = argparse.Namespace(
            input_folder=source,
            output_folder=SHARDS,
            inject_missing_state=True,
            keep_temp_folder=False,
            strict=True,
            num_extract_workers=1,
            num_merge_workers=1,
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                ds_to_universal.main(arguments)
            _drop_shard(Path(SHARDS, _UNIVERSAL, "optimizer_state.pt"))
        except RuntimeError as error:  # torch.save says RuntimeError for a full disk
            raise OSError(f"{target}: {error}") from error


def _drop_shard(path: Path) -> None:
    """Keep what is not a shard. For ZeRO-3 DeepSpeed writes rank 0's whole shard here, and every rank would hold it in
    memory to read a step.
    """
    document = torch.load(path, map_location="cpu", weights_only=False)
    if "fp32_flat_groups" in document:
        del document["fp32_flat_groups"]
        state = document["optimizer_state_dict"]["state"]
        document["optimizer_state_dict"]["state"] = {group: {"step": values["step"]} for group, values in state.items()}
        torch.save(document, path)
