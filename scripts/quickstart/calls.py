#!/usr/bin/env python3
"""Write the quick start's function calls: a request and two signatures, answered by one call as JSON.

    python -m scripts.quickstart.calls [--output recipes/quickstart/data]

calls.jsonl and heldout_calls.jsonl hold one chat per line, {"messages": [{"role", "content"}, ...]}. Signatures and
sentences are those of Python's standard library; the values are ours. Which function is meant, and with which
arguments, stands in the question, so every answer can be checked. No function of a held-out chat, right or wrong, is
in a training chat. Deterministic for one version of Python.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from scripts.quickstart.instructions import DEFAULT_OUTPUT, summary
from scripts.quickstart.stdlib_docs import Argument, Entry, entries

TRAIN_CHATS = 240
HELDOUT_CHATS = 40
LONGEST_CALL, LONGEST_SENTENCE, MOST_ARGUMENTS = 48, 64, 4  # characters, characters, count: short rows train fast
TASK = "Answer with one call as JSON."  # said outright, so that the untuned model has its chance
OPTIONAL_SHARE = 0.6  # of the optional arguments; the rest must stay out of the answer

RANGES = {"year": (1990, 2030), "month": (1, 12), "integer": (2, 99)}
CHOICES = {
    "file": "notes.txt photo.png data/sales.csv backup.zip readme.md src/app.py report.pdf log/today.log".split(),
    "folder": "downloads build data/raw old_photos backup src/pages invoices cache".split(),
    "word": ["hello world", "two birds", *"blue Anna river invoice total London spring coffee zebra".split()],
    "number": [0.5, 1.5, 2.25, 3, 7.5, 12, 40],
    "host": "example.org mail.example.com 10.0.0.7 files.example.net localhost".split(),
    "url": "https://example.org/a.html http://example.com/shop https://example.net/news".split(),
}

# What an argument of this name is given. An entry is used only when all its required arguments are known here.
NAMES = {
    "file": "path filename file src source dst target pathname fullname archive tarfile",
    "folder": "dir directory folder dirname root targetpath root_dir",
    "word": "name text s string msg message key section option prefix suffix line word title label pattern pat user who"
    " sep password typename domain category item value attribute server content comment data command",
    "year": "year theyear",
    "month": "month themonth day hour",
    "integer": "fd n k pid width length size lineno offset count level port limit uid gid status mode flags"
    " maxsize maxevents lo hi pos start stop step w c m base priority index which when second minute backlog",
    "number": "x y z a b seconds timeout delay interval mu sigma alpha beta lambd low high",
    "host": "host hostname address",
    "url": "url uri",
}
KIND_OF = {name: kind for kind, names in NAMES.items() for name in names.split()}


def main() -> None:
    """Pick the functions, split them, write both files, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    folder = parser.parse_args().output
    rng = random.Random(0)
    usable = _usable_entries()
    rng.shuffle(usable)
    held_out = 2 * HELDOUT_CHATS  # half of them are only offered, never right
    if len(usable) < held_out + TRAIN_CHATS:
        raise SystemExit(f"only {len(usable)} functions are usable, {held_out + TRAIN_CHATS} are needed")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "heldout_calls.jsonl", usable[:held_out], HELDOUT_CHATS, rng)
    _write(folder / "calls.jsonl", usable[held_out:], TRAIN_CHATS, rng)


def _usable_entries() -> list[Entry]:
    """Functions and methods with a short call, a short sentence that says what for, and arguments that we have values
    for; no two share a last name or a sentence."""
    by_sentence: dict[str, Entry] = {}
    for entry in filter(_is_usable, entries()):
        by_sentence.setdefault(summary(entry), entry)
    return list({entry.name.rsplit(".", 1)[-1].lower(): entry for entry in by_sentence.values()}.values())


def _is_usable(entry: Entry) -> bool:
    signature, sentence, arguments = _signature(entry), summary(entry), entry.arguments
    return (
        entry.kind != "class"
        and "*" not in signature
        and len(entry.full_name + signature) <= LONGEST_CALL
        and 20 <= len(sentence) <= LONGEST_SENTENCE
        and "deprecated" not in sentence.lower()
        and len(arguments) <= MOST_ARGUMENTS
        and any(_kind(argument) for argument in arguments)
        and all(_kind(argument) for argument in arguments if not argument.optional)
    )


def _signature(entry: Entry) -> str:
    """Like (path, mode=438): without the marks for positional and named arguments, which a JSON call does not need."""
    return re.sub(r", /|/, |\*, ", "", entry.signature)


def _kind(argument: Argument) -> str | None:
    if argument.default in ("True", "False"):
        return "flag"
    if re.fullmatch(r"-?\d+", argument.default):
        return "integer"
    return KIND_OF.get(argument.name)


def _write(path: Path, usable: list[Entry], count: int, rng: random.Random) -> None:
    chats = [_chat(entry, usable, rng) for entry in usable[:count]]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    print(f"{path}: {len(chats)} chats, {path.stat().st_size / 1e3:.0f} kB")


def _chat(entry: Entry, usable: list[Entry], rng: random.Random) -> list[dict[str, str]]:
    other = rng.choice([one for one in usable if one is not entry])
    offered = [entry, other]
    rng.shuffle(offered)
    wanted = {a.name: _value(a, rng) for a in entry.arguments if not a.optional or _mentioned(a, rng)}
    if not wanted:  # nothing is required, and nothing was drawn
        wanted = {a.name: _value(a, rng) for a in [a for a in entry.arguments if _kind(a)][:1]}
    said = list(wanted.items())
    rng.shuffle(said)
    lines = [f"{one.full_name}{_signature(one)}" for one in offered]
    request = summary(entry).rstrip(".") + ": " + ", ".join(f"{name} = {json.dumps(value)}" for name, value in said)
    call = {"name": entry.full_name, "arguments": wanted}
    return [
        {"role": "user", "content": "\n".join([TASK, request, *lines])},
        {"role": "assistant", "content": json.dumps(call)},
    ]


def _mentioned(argument: Argument, rng: random.Random) -> bool:
    return _kind(argument) is not None and rng.random() < OPTIONAL_SHARE


def _value(argument: Argument, rng: random.Random) -> str | int | float | bool:
    kind = _kind(argument) or "word"
    if kind == "flag":
        return argument.default == "False"  # nobody asks for the default
    if kind in RANGES:
        return rng.randint(*RANGES[kind])
    return rng.choice(CHOICES[kind])


if __name__ == "__main__":
    main()
