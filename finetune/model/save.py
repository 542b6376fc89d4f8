"""From a trained job to a folder that plain transformers (or peft) loads, checked after writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.errors import FinetuneError
from finetune.model.parameters import parameter_shape
from finetune.model.tokenizer import stop_token_ids
from finetune.model.trained_folder import BASE_FILE
from finetune.report.run_folder import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Shapes = dict[str, tuple[int, ...]]


class BrokenExport(FinetuneError):
    """What was written is not what was trained: a bug of ours or of the disk; the folder was not published."""

    exit_code = 4


def write_model(
    state: dict[str, Tensor],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write `state` (whole tensors by name; emptied on the way) as a Hugging Face folder or peft adapter, then publish
    it.

    `dtype` is that of a full model's file; adapters are written as they are. The folder is written and checked under a
    temporary name, `verify` may look at it and raise, and a rename publishes it. Raises BrokenExport when what was
    gathered is not the model, or what lies on disk is not what was gathered.
    """
    adapter = hasattr(model, "peft_config")
    _check_state(state, model, adapter)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    expected = _save_adapter(state, model, temporary, dtype) if adapter else _save_full(state, model, temporary, dtype)
    tokenizer.save_pretrained(temporary)
    if not adapter:
        _stop_at_turn_end(temporary, tokenizer)
    check_folder(temporary, expected, adapter)
    if verify is not None:
        verify(temporary)
    if folder.exists():  # of a run that was killed before it could say that it was done
        shutil.rmtree(old := folder.with_name(folder.name + ".old"), ignore_errors=True)
        os.rename(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def _check_state(state: dict[str, Tensor], model: nn.Module, adapter: bool) -> None:
    """What was gathered must be every trained (adapter) or every (full) parameter, whole."""
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad or not adapter]
    wrong = [n for n, p in parameters if state.get(n) is None or tuple(state[n].shape) != parameter_shape(p)]
    if wrong or not parameters:
        raise BrokenExport(f"export: {len(wrong)} weights were not gathered whole: {', '.join(wrong[:8])}")


def _save_full(state: dict[str, Tensor], model: nn.Module, folder: Path, dtype: str) -> Shapes:
    from transformers.core_model_loading import revert_weight_conversion

    parameters = {name for name, _ in model.named_parameters()}  # buffers keep their dtype, as in a loaded model
    for name in parameters & state.keys():
        state[name] = state[name].to(getattr(torch, dtype))
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in state and source not in state:  # the name that from_pretrained looks for
            state[source] = state.pop(tied)
    # transformers renames and splits weights on the way to the disk (mixtures of experts); shapes alone cost no memory
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, shapes).items()}
    model.save_pretrained(folder, state_dict=state)
    # it wrote the training dtype
    write_json(folder / "config.json", (read_json(folder / "config.json") or {}) | {"dtype": dtype})
    return expected


def _save_adapter(state: dict[str, Tensor], model: nn.Module, folder: Path, dtype: str) -> Shapes:
    from peft import get_peft_model_state_dict

    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    quantization = getattr(model.config, "quantization_config", None)
    base = {"dtype": dtype} | ({"quantization_config": quantization.to_dict()} if quantization is not None else {})
    write_json(folder / BASE_FILE, base)
    return {n: tuple(v.shape) for n, v in get_peft_model_state_dict(model, state, save_embedding_layers=False).items()}


def _stop_at_turn_end(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let plain generate() stop where the chat template ends a turn. On the file: transformers refuses to save a
    changed generation config when the original was odd."""
    path = folder / "generation_config.json"
    config = read_json(path)
    if config is not None:
        known = config.get("eos_token_id")
        known = [known] if isinstance(known, int) else list(known or [])
        stops = list(dict.fromkeys(known + stop_token_ids(tokenizer)))
        if stops and stops != known:
            write_json(path, config | {"eos_token_id": stops[0] if len(stops) == 1 else stops})


def check_folder(folder: Path, expected: Shapes, adapter: bool) -> None:
    """Compare the safetensors files with the expected names and shapes; nothing empty; an adapter finite and trained.

    Raises BrokenExport.
    """
    found: Shapes = {}
    problems, moved = [], False
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors file, not a mapping
                    found[name] = tuple(tensors.get_slice(name).get_shape())
                    if adapter:
                        value = tensors.get_tensor(name)
                        problems += [] if value.isfinite().all() else [f"not finite: {name}"]
                        # LoRA's A starts at random and B at zero: only B tells that something was trained
                        moved = moved or ("lora_A" not in name and bool(value.any()))
        except (SafetensorError, OSError) as error:
            raise BrokenExport(f"export: {file} cannot be read back: {error}") from error
    if not found:
        problems.append("no tensor was written")
    elif adapter and not moved:
        problems.append("all adapter weights are zero")
    problems += [f"empty: {n}" for n, shape in found.items() if 0 in shape]
    problems += [f"missing: {n}" for n in expected if n not in found]
    problems += [
        f"{n} has shape {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s
    ]
    problems += [f"not a tensor of this model: {n}" for n in found if n not in expected]
    if problems:
        raise BrokenExport(f"export: {folder} is not the trained model: " + "; ".join(problems[:8]))
