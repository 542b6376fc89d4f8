"""A trained folder read back for use: a full model, or an adapter on the base it was trained on."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.errors import UserError, reason
from finetune.model.adapters import plain_4bit_layers
from finetune.model.trained_folder import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNREADABLE = (OSError, ValueError, KeyError, SafetensorError, UnpicklingError)


def load_tokenizer(trained: Trained) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or its base's. Raises UserError."""
    from transformers import AutoTokenizer

    own = not trained.adapter or (Path(trained.name) / "tokenizer_config.json").exists()
    try:
        return AutoTokenizer.from_pretrained(trained.name if own else trained.base, trust_remote_code=False)
    except (*UNREADABLE, TypeError) as error:
        raise UserError(_unreadable(trained.name if own else trained.base, "tokenizer", error)) from error


def load(
    trained: Trained, device: torch.device, dtype: torch.dtype | None = None, dequantised: bool = False
) -> nn.Module:
    """The model on `device` in evaluation mode, its adapter attached.

    `dtype`: None takes the one it was saved (an adapter's base: held) in. A base that was held in 4 bits is quantised
    again, the same way; with `dequantised` its 4-bit values are then spread out in `dtype`. Raises UserError.
    """
    model = _load_base(trained, device, dtype, dequantised)
    if trained.adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, trained.name)
        except UNREADABLE as error:
            raise UserError(_unreadable(trained.name, "adapter", error)) from error
    return model.to(device).eval()


def _load_base(trained: Trained, device: torch.device, dtype: torch.dtype | None, dequantised: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    held = getattr(torch, trained.held["dtype"]) if "dtype" in trained.held else "auto"
    options: dict = {"dtype": dtype or held, "revision": trained.revision or "main", "trust_remote_code": False}
    quantization = trained.held.get("quantization_config")
    if quantization is not None:
        config = BitsAndBytesConfig.from_dict(quantization)
        if dtype is not None:
            config.bnb_4bit_compute_dtype = dtype
        options |= {"quantization_config": config, "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(trained.base, **options)
    except UNREADABLE as error:
        raise UserError(_unreadable(trained.base, "model", error, trained)) from error
    if quantization is not None and dequantised:
        return model.dequantize(dtype)
    plain_4bit_layers(model)
    return model


def _unreadable(name: str, what: str, error: Exception, trained: Trained | None = None) -> str:
    base = f" (the base of the adapter {trained.name})" if trained is not None and trained.adapter else ""
    return f"{name}{base}: its {what} cannot be loaded: {reason(error)}"
