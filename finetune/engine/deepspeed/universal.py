"""DeepSpeed's shards of one number of ranks made readable for any other: its universal checkpoint, one file per
parameter and state.

What DeepSpeed 0.19 needs for it and does not say: `inject_missing_state` for ZeRO-1 and 2 (only Megatron writes that
state by itself), AdamW's two moments under their names, and paths without special characters, since it uses them as
patterns. The frozen base of LoRA is in neither folder: adapters and their moments are converted like any other trained
parameter."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path

import torch

from finetune.engine.deepspeed.config import inside, only_known_pickles
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
