"""A LoRA adapter merged into its base, and the proof that the merged folder answers like the pair."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from finetune.errors import UserError
from finetune.model import saved
from finetune.model.distance import relative
from finetune.model.parameters import DTYPE_BYTES
from finetune.model.save import BrokenExport, write_model
from finetune.model.trained_folder import Trained, find

# Relative L2 difference of the logits, computed in float32: what rounding the merged weights to that dtype may cost.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def merge(found: Trained, output: Path, dtype: str) -> str:
    """Write the adapter `found` and its base as one full model to `output`; returns one line about it.

    `dtype` auto is the one the base was held in. Raises UserError (unreadable, tied weights adapted) and BrokenExport
    when the logits differ.
    """
    tokenizer = saved.load_tokenizer(found)
    cpu = torch.device("cpu")
    model = saved.load(found, cpu, torch.float32, dequantised=True)
    dtype = _base_dtype(found.held, model) if dtype == "auto" else dtype
    _refuse_tied(found.name, model)
    wanted = logits(model)
    with model.disable_adapter():
        moved = relative(logits(model), wanted)
    model = model.merge_and_unload()
    figures: list[float] = []

    def compare(written: Path) -> None:
        again = saved.load(find(str(written)), cpu, torch.float32)
        figures.append(relative(logits(again), wanted))
        if not figures[0] <= TOLERANCES[dtype]:
            shutil.rmtree(written)
            raise BrokenExport(
                f"export: the merged model's logits are {figures[0]:.1e} off the adapter's (relative L2), more than the"
                f" {TOLERANCES[dtype]:g} allowed for {dtype}; {output} was not written."
                + ("" if dtype == "float32" else " Try --dtype float32.")
            )

    output.parent.mkdir(parents=True, exist_ok=True)
    write_model(_state(model), model, tokenizer, output, dtype, compare)
    return (
        f"{output}: {found.base} with {found.name} merged in, {dtype}. Logits {figures[0]:.1e} off the adapter's"
        f" (relative L2, allowed {TOLERANCES[dtype]:g}); the adapter itself moves them by {moved:.1e}."
    )


@torch.no_grad()
def logits(model: nn.Module) -> dict[str, Tensor]:
    """Logits (2, tokens, vocabulary), under that name, of a fixed input of at most 64 tokens."""
    text = model.config.get_text_config()
    tokens = min(64, getattr(text, "max_position_embeddings", None) or 64)
    ids = torch.randint(0, text.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    return {"logits": model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()}


def _base_dtype(held: dict[str, Any], model: nn.Module) -> str:
    # without our own note: what the base's files say, which loading in float32 leaves in the config's name only
    name = held.get("dtype") or AutoConfig.from_pretrained(model.config.name_or_path, trust_remote_code=False).dtype
    name = str(name or "float32").removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"


def _refuse_tied(folder: str, model: nn.Module) -> None:
    base = model.get_base_model()
    tied = dict(getattr(base, "all_tied_weights_keys", None) or {})
    shared = {name.removesuffix(".weight") for name in (*tied, *tied.values())}
    adapted = sorted(name for name, module in base.named_modules() if hasattr(module, "lora_A") and name in shared)
    if adapted:
        raise UserError(
            f"{folder}: the adapter changes {', '.join(adapted)}, whose weights the model uses twice (tied"
            " embeddings). Merging would change both uses; keep it as an adapter."
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    return {name: tensor.detach() for name, tensor in named}
