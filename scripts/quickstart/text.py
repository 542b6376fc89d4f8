#!/usr/bin/env python3
"""Write the quick start's pre-training text: English from Python's own documentation strings (PSF licence).

    python -m scripts.quickstart.text [--output recipes/quickstart/data/python_docs.jsonl]

One JSON object per line, {"text": ...}: documents of a few hundred tokens, cut between paragraphs, so
that shuffling mixes all subjects. Deterministic for one version of Python; the committed file was made with
Python 3.11 on Linux. A document is either what `help()` says about some members of one module, a module's own
description, or a section of the language reference that `help("topic")` shows.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from scripts.quickstart.stdlib_docs import Entry, clean, entries, modules

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "data" / "python_docs.jsonl"
DOCUMENT_CHARACTERS = 850  # about 220 tokens of the quick start's tokenizer
SHORTEST_CHARACTERS = 120  # a heading and little else
MAX_BYTES = 1_500_000
TO_ASCII = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)


def main() -> None:
    """Collect, cut, shuffle with a fixed seed, write, and say how much it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output
    # the same text twice teaches memorising, not English
    documents = list(dict.fromkeys(text for text in _documents() if len(text) >= SHORTEST_CHARACTERS))
    random.Random(0).shuffle(documents)  # module after module would leave the end of an epoch lopsided
    lines, size = [], 0
    for document in documents:
        line = json.dumps({"text": document}) + "\n"
        if size + len(line) > MAX_BYTES:
            break
        lines.append(line)
        size += len(line)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {len(lines)} documents of {len(documents)}, {size / 1e6:.2f} MB")


def _documents() -> Iterator[str]:
    for module in modules():
        yield from _packed(_prose(clean(module.__doc__)), f"Module {module.__name__}:")
    for topic, text in sorted(_topics().items()):
        yield from _packed(_prose(text.translate(TO_ASCII)), f"Python topic {topic}:")
    for module, members in _by_module().items():
        yield from _packed([_member_help(entry) for entry in members], f"Help on module {module}:")


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _by_module() -> dict[str, list[Entry]]:
    grouped: dict[str, list[Entry]] = {}
    for entry in entries():
        grouped.setdefault(entry.module, []).append(entry)
    return grouped


def _member_help(entry: Entry) -> str:
    """What pydoc prints for one member, with the doctest sessions left out."""
    body = "\n\n".join(_prose(entry.doc)) or entry.doc
    return f"{entry.full_name}{entry.signature}\n" + textwrap.indent(body[:DOCUMENT_CHARACTERS], "    ")


def _prose(text: str) -> list[str]:
    """Paragraphs that read as English: no doctests, grammar productions, tables, rules or key listings."""
    text = re.sub(r"^[*=\-~^+#]{3,}$\n?", "", text, flags=re.MULTILINE)
    paragraphs = (part.strip("\n") for part in re.split(r"\n\s*\n", text))
    return [part for part in paragraphs if _reads_as_english(part)]


def _reads_as_english(part: str) -> bool:
    if ">>>" in part or "::=" in part or part.strip() == "::" or not part.isascii():
        return False
    letters = sum(character.isalpha() or character == " " for character in part)
    words = re.findall(r"[a-z]{2,}", part)
    return len(words) >= 3 and letters >= 0.65 * len(part)


def _packed(parts: list[str], heading: str) -> Iterator[str]:
    """Join parts under the heading into documents of about DOCUMENT_CHARACTERS; a longer part is cut at its lines."""
    room = DOCUMENT_CHARACTERS - len(heading)
    current: list[str] = []
    for part in (piece for whole in parts for piece in _cut(whole, room)):
        if current and sum(map(len, current)) + len(part) > room:
            yield "\n\n".join([heading, *current])
            current = []
        current.append(part)
    if current:
        yield "\n\n".join([heading, *current])


def _cut(part: str, room: int) -> Iterator[str]:
    lines: list[str] = []
    for line in part.splitlines():
        if lines and sum(map(len, lines)) + len(line) > room:
            yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join(lines)


if __name__ == "__main__":
    main()
