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
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from finetune.launch.strategy import Strategy

# on the disk together at most: fragments of all shards, the whole tensors made of them, one rank's shard
BYTES_FACTOR = 3


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


def convert(shards: Path, target: Path) -> None:
    """Write the shards in the folder `shards`, whose hashes were compared before, as a universal checkpoint into the
    folder `target`.

    In this process, one rank's shards in memory at a time. `shards` is only read. Raises OSError.
    """
    from deepspeed.checkpoint import ds_to_universal

    with only_known_pickles(), inside(target.parent):
        arguments = argparse.Namespace(
            input_folder=os.path.relpath(shards.resolve(), target.parent.resolve()),
            output_folder=target.name,
            inject_missing_state=True,
            keep_temp_folder=False,
            strict=True,
            num_extract_workers=1,
            num_merge_workers=1,
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                ds_to_universal.main(arguments)
            _drop_shard(Path(target.name, "zero", "optimizer_state.pt"))
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
