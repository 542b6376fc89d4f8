"""The state of an engine on disk, as one process and DDP have it: trained weights, optimizer, loss scale.

Rank 0 writes safetensors and JSON of what is trained; every rank reads it. What DeepSpeed writes: its checkpoint.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.engine.settings import Prepared
from finetune.errors import UserError, reason

MODEL, OPTIMIZER, SCALARS = "model.safetensors", "optimizer.safetensors", "optimizer.json"


@contextlib.contextmanager
def readable(folder: Path, more: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raises UserError where a file of a verified checkpoint cannot be read as what its name says; `more` are errors
    that mean this, too."""
    errors = (SafetensorError, UnpicklingError, UnicodeDecodeError, json.JSONDecodeError)
    try:
        yield
    except errors + more as error:
        raise UserError(
            f"{folder}: unreadable checkpoint file, although its SHA-256 matches manifest.json: {reason(error)} Whoever"
            " changed the file changed the manifest, too: do not resume from this folder."
        ) from error


def save(prepared: Prepared, folder: Path) -> list[str]:
    """Write the state into `folder`; returns the names of its files. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    scalars = _split(_optimizer(prepared).state_dict()["state"], "", tensors, set())
    scaler = prepared.accelerator.scaler
    document = {"state": scalars, "loss_scaler": scaler.state_dict() if scaler is not None else None}
    try:
        save_file(_trained(prepared), folder / MODEL)
        save_file(tensors, folder / OPTIMIZER)
    except SafetensorError as error:  # a full disk is no OSError to it
        raise OSError(str(error)) from error
    (folder / SCALARS).write_text(json.dumps(document, allow_nan=False))
    return [MODEL, OPTIMIZER, SCALARS]


def load(prepared: Prepared, folder: Path) -> None:
    """Read what `save` wrote; `folder` has been verified."""
    saved = read_trained(folder)
    mine = _trained(prepared)
    assert mine.keys() == saved.keys(), "the facts were compared before"
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])
    document = json.loads((folder / SCALARS).read_text())
    optimizer = _optimizer(prepared)
    state = _joined(document["state"], load_file(folder / OPTIMIZER))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if document["loss_scaler"] is not None:
        prepared.accelerator.scaler.load_state_dict(document["loss_scaler"])


def read_trained(folder: Path) -> dict[str, Tensor]:
    """The trained parameters that `save` wrote, by their names in the model."""
    return load_file(folder / MODEL)


def _trained(prepared: Prepared) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in prepared.inner_model().named_parameters() if p.requires_grad}


def _optimizer(prepared: Prepared) -> Any:
    return prepared.optimizer.optimizer  # inside accelerate's wrapper


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
