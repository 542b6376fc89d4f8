"""The state of an engine on disk: trained weights, optimizer, loss scale. Written between two windows, read before the
first.

One process and DDP: rank 0 writes safetensors and JSON of what is trained; every rank reads it. DeepSpeed: every rank
writes its own shards in DeepSpeed's format, which are pickles: whoever reads them has compared their hashes with our
manifest before, and only tensors, containers and a few classes of DeepSpeed are built from them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.engine.deepspeed.checkpoint import convert, inside, only_known_pickles, read_shards
from finetune.engine.engine import Engine
from finetune.errors import UserError, reason

MODEL, OPTIMIZER, SCALARS, SHARDS = "model.safetensors", "optimizer.safetensors", "optimizer.json", "deepspeed"
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def save_state(engine: Engine, folder: Path) -> list[str]:
    """Write this rank's part of the state into `folder`; returns the names of its files. A collective. Raises
    OSError.
    """
    if engine.strategy.engine == "deepspeed":
        return _save_shards(engine, folder)
    if engine.rank != 0:
        return []
    tensors: dict[str, Tensor] = {}
    scalars = _split(engine.optimizer.optimizer.state_dict()["state"], "", tensors, set())
    scaler = engine.accelerator.scaler
    document = {"state": scalars, "loss_scaler": scaler.state_dict() if scaler is not None else None}
    try:
        save_file(_trained(engine), folder / MODEL)
        save_file(tensors, folder / OPTIMIZER)
    except SafetensorError as error:  # a full disk is no OSError to it
        raise OSError(str(error)) from error
    (folder / SCALARS).write_text(json.dumps(document, allow_nan=False))
    return [MODEL, OPTIMIZER, SCALARS]


def load_state(engine: Engine, folder: Path) -> None:
    """Read what `save_state` wrote under the same strategy; `folder` has been verified. A collective.

    Raises UserError where a file does not hold what its name says, which only a forged manifest lets through.
    """
    with _readable(folder):
        _load_state(engine, folder)


def read_trained(folder: Path, sharded: bool) -> dict[str, Tensor]:
    """The trained parameters in a checkpoint, whole, by their names in the Hugging Face (or peft) model. No process
    group.

    `folder` has been verified; `sharded` says that DeepSpeed wrote it: these come in float32. Raises UserError.
    """
    with _readable(folder):
        if not sharded:
            return load_file(folder / MODEL)
        try:
            tensors = read_shards(folder, SHARDS)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            # DeepSpeed takes what it reads at its word
            raise UserError(_not_a_state(folder, error)) from error
        prefix = "model."  # of the summed-loss module that holds the model
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, UnpicklingError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(_not_a_state(folder, error)) from error


def _not_a_state(folder: Path, error: Exception) -> str:
    return (
        f"{folder}: a file of it is no state of a run, though manifest.json says that it is as it was written:"
        f" {reason(error)} Who changed it changed the manifest, too: do not go on from this folder."
    )


def _load_state(engine: Engine, folder: Path) -> None:
    if engine.strategy.engine == "deepspeed":
        _load_shards(engine, folder, universal=False)
        return
    saved = load_file(folder / MODEL)
    mine = _trained(engine)
    assert mine.keys() == saved.keys(), "the facts were compared before"
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])
    document = json.loads((folder / SCALARS).read_text())
    optimizer = engine.optimizer.optimizer
    state = _joined(document["state"], load_file(folder / OPTIMIZER))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if document["loss_scaler"] is not None:
        engine.accelerator.scaler.load_state_dict(document["loss_scaler"])


def convert_state(folder: Path, target: Path) -> None:
    """Make what a DeepSpeed engine saved into `folder` readable for `load_converted`, in the folder `target`. One
    process.

    Raises OSError, and UserError as `load_state` does.
    """
    with _readable(folder):
        convert(folder / SHARDS, target / SHARDS)


def load_converted(engine: Engine, folder: Path) -> None:
    """Read what `convert_state` wrote, on any number of ranks. A collective."""
    _load_shards(engine, folder, universal=True)


def _load_shards(engine: Engine, folder: Path, universal: bool) -> None:
    # DeepSpeed brings the groups' settings back with the state, under ZeRO-3 from a universal checkpoint those of the
    # first group for all, and its clipping; the recipe's stand, also where a change was allowed
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    engine.module._config.load_universal_checkpoint = universal
    with only_known_pickles(), inside(folder):
        found, _ = engine.module.load_checkpoint(
            ".", tag=SHARDS, load_module_strict=False, load_lr_scheduler_states=False
        )
    assert found is not None, f"DeepSpeed read nothing from {folder}"
    for group, values in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(values)
    engine.optimizer.optimizer.clip_grad = engine.max_grad_norm


def _trained(engine: Engine) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in engine.inner_model().named_parameters() if p.requires_grad}


def _save_shards(engine: Engine, folder: Path) -> list[str]:
    errors: list[OSError] = []
    writer = engine.module.checkpoint_engine
    save = writer.save

    def save_or_keep_the_error(state_dict: Any, path: str) -> None:
        try:
            save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a full disk
            # the other ranks wait for this one at DeepSpeed's next barrier: go on, complain afterwards
            errors.append(error if isinstance(error, OSError) else OSError(f"{path}: {error}"))

    writer.save = save_or_keep_the_error
    # its conversion scripts are no state, and a full disk would stop rank 0 before the others' barrier
    engine.module._copy_recovery_script = lambda save_path: None
    try:
        engine.module.save_checkpoint(str(folder), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
    finally:
        writer.save = save
        del engine.module._copy_recovery_script
    if errors:
        raise errors[0]
    names = sorted(str(path.relative_to(folder)) for path in (folder / SHARDS).rglob("*") if path.is_file())
    owner = {name: int(found[1]) if (found := _OF_RANK.search(name)) else 0 for name in names}
    return [name for name in names if owner[name] == engine.rank]


def _split(value: Any, name: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under a name of their own. Keys of dictionaries become text.

    No copy beside the states where they lie, which may be all that a device has room for: those of a GPU are copied to
    the host, those of the host are written as they are."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in storages and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        storages.add(storage.data_ptr())
        # bitsandbytes gives every parameter the same table of 8-bit values, and safetensors refuses shared memory
        tensors[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "items": {
                str(key): _split(item, f"{name}/{key}" if name else str(key), tensors, storages)
                for key, item in value.items()
            }
        }
    if isinstance(value, (list, tuple)):
        return {"list": [_split(item, f"{name}/{i}", tensors, storages) for i, item in enumerate(value)]}
    return {"value": value}


def _joined(value: dict, tensors: dict[str, Tensor]) -> Any:
    """What `_split` took apart; keys that are whole numbers are numbers again."""
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "items" in value:
        return {int(key) if key.isdigit() else key: _joined(item, tensors) for key, item in value["items"].items()}
    if "list" in value:
        return [_joined(item, tensors) for item in value["list"]]
    return value["value"]
