"""From a trained job to a folder that plain transformers (or peft) loads, checked after writing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.backend.engine import Engine
from finetune.errors import FinetuneError
from finetune.model import DTYPES


class BrokenExport(FinetuneError):
    """What was written is not what was trained: a bug of ours or of the disk; the folder was not published."""


def write_model(state: dict[str, Tensor], model: nn.Module, tokenizer, folder: Path, dtype: str) -> None:
    """Write `state` (whole tensors by name) as a Hugging Face folder or peft adapter, check it, then publish by rename.

    Raises BrokenExport when what lies on disk is not what was handed in.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    adapter = hasattr(model, "peft_config")
    if adapter:
        expected = _save_adapter(state, model, temporary)
    else:
        expected = _save_full(state, model, temporary, DTYPES[dtype])
    tokenizer.save_pretrained(temporary)
    check_folder(temporary, expected, adapter)
    os.replace(temporary, folder)


def _save_full(state: dict[str, Tensor], model: nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, tuple]:
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    trained_cache, model.config.use_cache = model.config.use_cache, True
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict=cast)
    model.config.use_cache = trained_cache
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tuple(value.shape) for name, value in cast.items() if name not in tied}


def _save_adapter(state: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, tuple]:
    from peft import get_peft_model_state_dict

    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    return {n: tuple(v.shape) for n, v in get_peft_model_state_dict(model, state, save_embedding_layers=False).items()}


def check_folder(folder: Path, expected: dict[str, tuple], adapter: bool) -> None:
    """Compare the safetensors files with the expected names and shapes; nothing empty, adapters not all zero."""
    found: dict[str, tuple] = {}
    largest = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                found[name] = tuple(tensors.get_slice(name).get_shape())
                if adapter:
                    largest = max(largest, float(tensors.get_tensor(name).abs().max()))
    problems = [f"missing: {n}" for n in expected if n not in found]
    problems += [f"{n} has shape {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s]
    problems += [f"empty: {n}" for n, shape in found.items() if 0 in shape]
    problems += [f"not a tensor of this model: {n}" for n in found if n not in expected]
    if not found:
        problems.append("no tensor was written")
    if adapter and found and largest == 0.0:
        problems.append("all adapter weights are zero")
    if problems:
        raise BrokenExport(f"export: {folder} is not the trained model: " + "; ".join(problems[:8]))


def export_model(engine: Engine, tokenizer, dtype: str, folder: Path) -> None:
    """Gather the trained weights from every rank and write `folder` on rank 0. A collective. Raises BrokenExport."""
    model = engine.inner_model()
    state = engine.gather_state(only_trained=hasattr(model, "peft_config"))
    if engine.rank == 0:
        write_model(state, model, tokenizer, folder, dtype)
    engine.wait()
