"""What makes a run the same run: recipe keys, base model, tokenizer, library versions; and what is different now."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.report import redact

# Keys that change neither the rows of a window nor what is done with them.
FREE_KEYS = (
    "output_dir",
    "include",
    "logging.",
    "checkpoint.",
    "evaluation.",
    "data.packing",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.device_memory",
    "training.stop_on_loss_spike",
    "training.step_timeout_seconds",
)
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")
ENDS_BYTES = 1 << 20


def versions() -> dict[str, str]:
    """The versions of the libraries a run rests on."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def base_fingerprint(name_or_path: str, revision: str) -> str:
    """What the base model's weights are: the commit of a hub model; names, sizes and both ends of the files of a local
    folder.

    An adapter's checkpoint does not hold its base: another one in the same place must be noticed.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
        return Path(cached).parent.name if isinstance(cached, str) else "unknown"
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        size = file.stat().st_size
        with open(file, "rb") as content:
            digest.update(f"{file.name} {size} ".encode() + content.read(ENDS_BYTES))
            content.seek(max(0, size - ENDS_BYTES))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What the tokenizer does: its pieces, merges and rules, and the chat template."""
    text = (
        tokenizer.backend_tokenizer.to_str()
        if hasattr(tokenizer, "backend_tokenizer")
        else str(sorted(tokenizer.get_vocab().items()))
    )
    return hashlib.sha256((text + str(tokenizer.chat_template)).encode()).hexdigest()


def differences(then: dict, now: dict, allowed: Sequence[str] = ()) -> list[str]:
    """What of a checkpoint's facts is different now, one `name: then -> now` each; keys in `allowed` may differ."""
    old, new = flat(then), flat(now)
    found = [name for name in sorted(old.keys() | new.keys()) if not _same(old.get(name), new.get(name))]
    kept = [name for name in found if name.removeprefix("recipe.") not in allowed]
    return [
        f"{name.removeprefix('recipe.')}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}" for name in kept
    ]


def _same(then: object, now: object) -> bool:
    """Whether two values agree. What was taken for a secret in one shell need not be known as one in another: its place
    may hold any text.
    """
    if then == now or not (isinstance(then, str) and isinstance(now, str)):
        return then == now
    patterns = [
        (re.escape(masked).replace(re.escape(redact.MASK), ".+"), text)
        for masked, text in ((then, now), (now, then))
        if redact.MASK in masked
    ]
    return any(re.fullmatch(pattern, text, re.DOTALL) for pattern, text in patterns)


def comparable(recipe: dict) -> dict:
    """The keys of a resolved recipe that a resume must find unchanged, dotted."""
    return {key: value for key, value in flat(recipe).items() if not key.startswith(FREE_KEYS)}


def flat(value: dict, prefix: str = "") -> dict:
    """The leaves of nested mappings by their dotted names."""
    leaves: dict = {}
    for key, item in value.items():
        leaves |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return leaves
