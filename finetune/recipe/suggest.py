"""What a wrong key was probably meant to be: our keys elsewhere, other tools' names, near misses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from finetune.recipe.foreign_keys import FOREIGN, SAID_IN_WORDS

# Keys that are planned but do nothing yet; they do not exist until they work.
LATER = frozenset(("training.objective", "training.pure_bf16", "training.global_batch_tokens"))


def suggest(section: str, key: str, own: Mapping[str, Iterable[str]]) -> str:
    """A sentence that leads from the unknown `key` of `section` ("" at the top) to the right one.

    `own` maps each section's dotted name to its keys; list items are named `data.train[]`.
    """
    full = f"{section}.{key}" if section else key
    plain = _plain(key)
    here = list(own.get(section, ()))
    if full in LATER:
        return f"{full} is not available yet; leave it out."
    if plain in here:
        return f"Did you mean {plain}?"
    if home := _home(section, plain, own):
        return home
    dotted = {f"{name}.{k}" if name else k: k for name, keys in own.items() for k in keys}
    if near := get_close_matches(plain, here, n=1, cutoff=0.7):
        return f"Did you mean {near[0]}?"
    if far := get_close_matches(plain, list(dotted.values()), n=1, cutoff=0.7):
        return f"Did you mean {next(full for full, k in dotted.items() if k == far[0])}?"
    if foreign := get_close_matches(plain, list(FOREIGN), n=1, cutoff=0.85):
        return f"Use {FOREIGN[foreign[0]]}."
    if near := get_close_matches(plain, here, n=1, cutoff=0.5):
        return f"Did you mean {near[0]}?"
    return f"Keys{f' of {section}' if section else ''}: {', '.join(here)}."


def suggest_inside(value: Any, own: Mapping[str, Iterable[str]], limit: int = 8) -> str:
    """For an unknown section: where the keys in it belong, as a sentence (empty when none is recognised)."""
    found: dict[str, str] = {}
    refused = ""
    todo = [value]
    while todo:
        holder = todo.pop(0)
        for key, item in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(item, (dict, list)):
                todo.append(item)
            if isinstance(key, str) and (target := _target(_plain(key), own)):
                found.setdefault(key, target)
            elif key == "zenflow":
                refused = f" {SAID_IN_WORDS[key]}"
    pairs = [f"{key} is {target}" for key, target in list(found.items())[:limit]]
    return (f" Inside it, {', '.join(pairs)}." if pairs else "") + refused


def _plain(key: str) -> str:
    return key.strip().lower().replace("-", "_").replace(" ", "_")


def _home(section: str, plain: str, own: Mapping[str, Iterable[str]]) -> str:
    """Where an exactly known name belongs: another tool's in this section, ours elsewhere, another tool's anywhere."""
    if f"{section}.{plain}" in FOREIGN:
        return f"Use {FOREIGN[f'{section}.{plain}']}."
    # first: `warmup` elsewhere is another tool's word for training.warmup_steps, not accumulation.warmup
    if plain in FOREIGN:
        return f"Use {FOREIGN[plain]}."
    if elsewhere := _elsewhere(plain, own):
        return f"It belongs to {elsewhere.rpartition('.')[0] or 'the top level'}: {elsewhere}."
    return SAID_IN_WORDS.get(plain, "")


def _elsewhere(plain: str, own: Mapping[str, Iterable[str]]) -> str:
    return next((f"{name}.{plain}" if name else plain for name, keys in own.items() if plain in keys), "")


def _target(plain: str, own: Mapping[str, Iterable[str]]) -> str:
    return _elsewhere(plain, own) or FOREIGN.get(plain, "")


def closest(value: str, choices: Iterable[str]) -> str:
    """` Did you mean x?` for the nearest choice, or an empty string."""
    near = get_close_matches(value.lower(), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
