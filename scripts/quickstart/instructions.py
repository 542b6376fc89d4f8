#!/usr/bin/env python3
"""Write the quick start's instruction set: questions about Python's standard library, answered in a fixed form.

    python -m scripts.quickstart.instructions [--output recipes/quickstart/data]

instructions.jsonl and heldout.jsonl hold one chat per line, {"messages": [{"role", "content"}, ...]}. The facts come
from the same documentation strings as the pre-training text (PSF licence); the form of the answers is ours. What an
answer needs stands in its question, so that even a tiny model can answer about functions it was never tuned on: the
held-out chats ask about functions that no training chat names. Deterministic for one version of Python.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from scripts.quickstart.stdlib_docs import Argument, Entry, entries

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "data"
TRAIN_CHATS = 1400
HELDOUT_CHATS = 140
FOLLOW_UP_SHARE = 0.15  # of chats that have a second question, so that several turns are trained and masked

Turn = Callable[[Entry, random.Random], tuple[str, str]]  # -> (question, answer)


def main() -> None:
    """Pick the functions, split them, write one chat per function, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    folder = parser.parse_args().output
    rng = random.Random(0)
    usable = _usable_entries()
    rng.shuffle(usable)
    if len(usable) < TRAIN_CHATS + HELDOUT_CHATS:
        raise SystemExit(f"only {len(usable)} functions are usable, {TRAIN_CHATS + HELDOUT_CHATS} are needed")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "heldout.jsonl", usable[:HELDOUT_CHATS], rng)
    _write(folder / "instructions.jsonl", usable[HELDOUT_CHATS : HELDOUT_CHATS + TRAIN_CHATS], rng)


def _usable_entries() -> list[Entry]:
    """Entries with a known signature, at most five arguments and a summary of a sensible length; no two share a last
    name or a summary, so that a held-out question is never a training question in disguise."""
    by_name: dict[str, Entry] = {}
    for entry in entries():
        if entry.arguments and len(entry.arguments) <= 5 and 20 <= len(summary(entry)) <= 110:
            by_name.setdefault(_last_name(entry).lower(), entry)
    return list({summary(entry): entry for entry in by_name.values()}.values())


def _write(path: Path, chosen: list[Entry], rng: random.Random) -> None:
    chats = [_chat(entry, TURNS[index % len(TURNS)], rng) for index, entry in enumerate(chosen)]
    rng.shuffle(chats)
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    print(f"{path}: {len(chats)} chats, {path.stat().st_size / 1e6:.2f} MB")


def _chat(entry: Entry, turn: Turn, rng: random.Random) -> list[dict[str, str]]:
    turns = [turn]
    if rng.random() < FOLLOW_UP_SHARE:
        turns.append(rng.choice([other for other in TURNS if other is not turn]))
    messages = []
    for one in turns:
        question, answer = one(entry, rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def summary(entry: Entry) -> str:
    """First sentence of the documentation on one line, ending in a full stop; "" when it does not read as one."""
    paragraph = re.sub(r"\s+", " ", entry.doc.split("\n\n")[0]).strip()
    sentence = re.split(r"(?<=[a-z)\]'\"])\.(?:\s|$)", paragraph)[0].strip().rstrip(".:")
    odd = ">>>" in sentence or "->" in sentence or "`" in sentence or not re.match(r"[A-Z][a-z]+ ", sentence)
    return "" if odd or entry.full_name in sentence or len(sentence.split()) < 4 else sentence + "."


def _last_name(entry: Entry) -> str:
    return entry.name.rsplit(".", 1)[-1]


def _what(entry: Entry, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(
        [
            "What does `{call}` do? Its documentation says: {summary}",
            "Explain `{call}` to me. The documentation reads: {summary}",
            "Please describe `{call}`. From the manual: {summary}",
            "I found `{call}` in some code. The manual says: {summary} What is it?",
        ]
    )
    answer = "**{name}** is a {kind} of the module `{module}`.\n\n- What it does: {summary}\n- Arguments: {short_list}"
    return _fill(question, entry), _fill(answer, entry)


def _arguments(entry: Entry, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(
        [
            "Which arguments does `{call}` take?",
            "List the arguments of `{call}`.",
            "What do I have to pass to `{call}`?",
            "Tell me which arguments of `{call}` are optional.",
        ]
    )
    return _fill(question, entry), _fill("**{name}** takes {count}:\n\n{long_list}", entry)


def _how(entry: Entry, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(
        [
            "How do I call `{call}`?",
            "Show me an example of `{call}`.",
            "Give me a code snippet that uses `{call}`.",
            "How would I use `{call}` in my program?",
        ]
    )
    before = "" if entry.module == "builtins" else "import {module}\n\n"
    prefix = "" if entry.module == "builtins" else "{module}."
    made = f"result = {prefix}{{name}}({{required}})"
    if entry.kind == "method":  # a method needs an object of its class first
        before += f"thing = {prefix}{entry.name.rsplit('.', 1)[0]}(...)\n"
        made = f"result = thing.{_last_name(entry)}({{required}})"
    answer = "Here is how to call **{name}**:\n\n```python\n" + before + made + "\n```"
    return _fill(question, entry), _fill(answer, entry)


def _where(entry: Entry, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(
        [
            "Where does `{call}` live?",
            "Which module has `{call}`?",
            "What do I import for `{call}`?",
            "Is `{call}` part of the standard library?",
        ]
    )
    home = "needs no import" if entry.module == "builtins" else "lives in the module `{module}`"
    code = "" if entry.module == "builtins" else "\n\n```python\nimport {module}\n```"
    return _fill(question, entry), _fill("**{name}** " + home + "." + code, entry)


TURNS: tuple[Turn, ...] = (_what, _arguments, _how, _where)


def _fill(template: str, entry: Entry) -> str:
    """Put an entry's facts into the {placeholders}; one pass, because signatures may contain braces themselves."""
    facts = {
        "name": entry.name,
        "module": entry.module,
        "kind": entry.kind,
        "call": entry.full_name + entry.signature,
        "summary": summary(entry),
        "count": "1 argument" if len(entry.arguments) == 1 else f"{len(entry.arguments)} arguments",
        "short_list": ", ".join(f"`{a.name}`" + " (optional)" * a.optional for a in entry.arguments),
        "long_list": "\n".join(_argument_line(i, a) for i, a in enumerate(entry.arguments, 1)),
        "required": ", ".join(f"{a.name}=" * a.keyword_only + a.name for a in entry.arguments if not a.optional),
    }
    return re.sub(r"\{(\w+)\}", lambda match: facts[match.group(1)], template)


def _argument_line(number: int, argument: Argument) -> str:
    if argument.optional:
        return f"{number}. `{argument.name}` (optional, default `{argument.default}`)"
    return f"{number}. `{argument.name}` (required)"


if __name__ == "__main__":
    main()
