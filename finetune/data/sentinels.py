"""Single private-use characters set into the contents of messages, so that a rendering says what came from where."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from finetune.data.chat_template import UnusableRow
from finetune.data.messages import REASONING

# Templates look for tags such as </think> or [TOOL_CALLS] inside contents and cut there, so tags are never marked.
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z_]{1,40}\]")
PLANES = (0xF0000, 0x100000)
_MARKS_PER_PLANE = 0xFFF0
MARKS = {p: re.compile(f"[{chr(p)}-{chr(p + _MARKS_PER_PLANE)}]") for p in PLANES}


@dataclass(frozen=True)
class Marked:
    """A message with marks set, and what is needed to find the edges of an assistant's content again.

    `opens` and `closes` map a mark to the piece of content that precedes or follows it up to the trained edge;
    `calls` are the marks inside its tool calls.
    """

    message: dict
    opens: dict[str, str] = field(default_factory=dict)
    closes: dict[str, str] = field(default_factory=dict)
    calls: frozenset[str] = frozenset()


def spaced_edges(messages: Sequence[dict]) -> list[tuple[int, int]]:
    """(message, 0 | 1) for every assistant content that begins (0) or ends (1) with white space."""
    return [
        (i, side)
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (body := (message["content"] or "").strip())
        for side in (0, 1)
        if not (message["content"].endswith(body) if side else message["content"].startswith(body))
    ]


def mark_all(messages: Sequence[dict], outside: set[tuple[int, int]], plane: int) -> list[Marked]:
    """Every message with its marks, in rising order. At the edges in `outside` they stand outside the white space.

    Raises NotLocated when a plane of private-use characters does not suffice.
    """
    numbers = iter(range(plane, plane + _MARKS_PER_PLANE))

    def next_mark() -> str:
        number = next(numbers, None)
        if number is None:
            raise UnusableRow("it has too many tags to find the assistant turns")
        return chr(number)

    result = []
    for i, message in enumerate(messages):
        content = message["content"] or ""
        low = len(content) - len(content.lstrip())
        high = max(low, len(content.rstrip()))
        if message["role"] == "assistant":
            low = 0 if (i, 0) in outside else low
            high = len(content) if (i, 1) in outside else high
            result.append(_assistant(message, low, high, next_mark))
        else:
            # where the message begins and ends: no assistant turn reaches into it
            segments = _segments(content, low, high)
            start, end = segments[0][0], segments[-1][1]
            marked = content[:start] + next_mark() + content[start:end] + next_mark() + content[end:]
            result.append(Marked({**message, "content": marked}))
    return result


def _assistant(message: dict, low: int, high: int, next_mark: Callable[[], str]) -> Marked:
    opens: dict[str, str] = {}
    closes: dict[str, str] = {}

    def wrap(text: str, low: int, high: int) -> str:
        pieces, done = [], 0
        for start, end in _segments(text, low, high):
            opening, closing = next_mark(), next_mark()
            opens[opening], closes[closing] = text[low:start], text[end:high]
            pieces += [text[done:start], opening, text[start:end], closing]
            done = end
        return "".join(pieces) + text[done:]

    result = dict(message)
    for name in REASONING:
        if (text := message.get(name)) and text.strip():
            low_of, high_of = len(text) - len(text.lstrip()), len(text.rstrip())
            result[name] = wrap(text, low_of, high_of)
    content, calls = message["content"], message.get("tool_calls")
    if content or not calls:  # templates ask whether a call has content: an empty one must stay empty
        result["content"] = wrap(content or "", low, high)
    in_calls: set[str] = set()
    if calls:

        def with_mark(value: object) -> object:
            if isinstance(value, dict):
                return {key: with_mark(part) for key, part in value.items()}
            if isinstance(value, list):
                return [with_mark(part) for part in value]
            if isinstance(value, str):
                in_calls.add(mark := next_mark())
                return value + mark
            return value

        result["tool_calls"] = [
            {**call, "function": {name: with_mark(part) for name, part in call["function"].items()}} for call in calls
        ]
    return Marked(result, opens, closes, frozenset(in_calls))


def _segments(content: str, low: int, high: int) -> list[tuple[int, int]]:
    """The stretches of content[low:high] between tags, white space beside a tag left out; at least one."""
    segments, position = [], low
    for tag in [*_TAG.finditer(content, low, high), None]:
        start, end = position, tag.start() if tag else high
        position = tag.end() if tag else high
        if start > low:
            start += len(content[start:end]) - len(content[start:end].lstrip())
        if end < high:
            end = max(start, start + len(content[start:end].rstrip()))
        if content[start:end].strip():
            segments.append((start, end))
    return segments or [(low, high)]
