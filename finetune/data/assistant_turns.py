"""Where the assistant speaks: character spans of assistant turns in a chat template's rendering.

Any template works, with or without `{% generation %}` marks, because nothing is read from the template. A conversation
is rendered twice: as it is, and with single private-use characters set into the contents of its messages. When the
second rendering without those characters equals the first, their places say exactly which characters of the first
came from which message. Spans always belong to the full rendering: templates may strip contents or rewrite history
(Qwen3 drops the thinking of earlier turns), so the rendering of the first n messages is not a prefix of the whole.

A turn is what the model has to write itself: it begins where the template's generation prompt ends (so a channel name
or an empty thought that the template adds belongs to it) and ends with its end-of-turn token.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from finetune.data.chat_template import ChatFormat, UnusableRow
from finetune.data.messages import REASONING
from finetune.data.sentinels import MARKS, PLANES, Marked, mark_all, spaced_edges

_Places = list[tuple[str, int]]  # marks in order of appearance, each with its place in the unmarked rendering
_Render = Callable[[Sequence[dict]], str]


@dataclass(frozen=True)
class Turn:
    """One assistant turn: characters [start, end) of the rendering, its end-of-turn token included if `ends`."""

    start: int
    end: int
    ends: bool


@dataclass(frozen=True)
class Rendered:
    """The full rendering of a conversation and its assistant turns in order of appearance."""

    text: str
    turns: tuple[Turn, ...]


def render_turns(chat: ChatFormat, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> Rendered:
    """Render a conversation and locate every assistant turn in it.

    Returns the text and one Turn per assistant message that the template shows, in order. A template that ends turns
    by the next header alone gets the eos token after the last one. Raises NotLocated when the template refuses the
    conversation, does not show its tools or tool calls, or changes contents beyond recognition.
    """
    _check_shown(chat, messages, tools)
    if not any(message.get("tool_calls") for message in messages):
        return _render_turns(chat, messages, partial(chat.render, tools=tools))
    problem: UnusableRow | None = None
    # templates disagree on how a call looks: no content or an empty one, arguments as object or as text
    for empty, as_text in ((None, False), ("", False), (None, True), ("", True)):
        try:
            return _render_turns(chat, messages, partial(_render_calls, chat, tools, empty, as_text))
        except UnusableRow as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _render_calls(
    chat: ChatFormat, tools: Sequence[dict] | None, empty: str | None, as_text: bool, messages: Sequence[dict]
) -> str:
    shown = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [dict(call, function=dict(call["function"])) for call in message["tool_calls"]]
            for call in calls if as_text else ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            message = {**message, "content": message["content"] or empty, "tool_calls": calls}
        shown.append(message)
    text = chat.render(shown, tools)
    for message in shown if not as_text else ():
        for call in message.get("tool_calls", ()):
            if (arguments := call["function"]["arguments"]) and str(arguments) in text and "'" in str(arguments):
                raise UnusableRow("the chat template writes the arguments of calls as Python, not as JSON")
    return text


def _check_shown(chat: ChatFormat, messages: Sequence[dict], tools: Sequence[dict] | None) -> None:
    template = chat.template
    if tools and "tools" not in template:
        raise UnusableRow("the chat template has no place for tools")
    if any(message.get("tool_calls") for message in messages) and "tool_calls" not in template:
        raise UnusableRow("the chat template has no place for tool calls")
    # transformers hands a thought to the template under every one of these names
    if not any(name in template for name in REASONING):
        thoughtful = next((name for message in messages for name in REASONING if message.get(name)), None)
        if thoughtful:
            raise UnusableRow(f"the chat template has no place for `{thoughtful}`")


def _render_turns(chat: ChatFormat, messages: Sequence[dict], render: _Render) -> Rendered:
    text = render(messages)
    plane = next((p for p in PLANES if not MARKS[p].search(text)), None)
    if plane is None:
        raise UnusableRow("its text uses the private-use characters needed to find the assistant turns")
    marked, marked_text = _mark_like(render, messages, text, plane)
    places = [(m.group(), m.start() - n) for n, m in enumerate(MARKS[plane].finditer(marked_text))]
    turns = _turns(chat, render, messages, marked, places, text)
    if turns and not turns[-1].ends and not text[turns[-1].end :].strip() and (eos := chat.tokenizer.eos_token):
        text = text[: turns[-1].end] + eos
        turns[-1] = Turn(turns[-1].start, len(text), True)
    return Rendered(text, tuple(turns))


def _mark_like(render: _Render, messages: Sequence[dict], text: str, plane: int) -> tuple[list[Marked], str]:
    """Marked messages whose rendering, marks removed, is `text`; and that rendering.

    White space at the edges of an assistant's content belongs to the turn where the template keeps it. The marks go
    outside it first; a template that strips then renders differently, and the marks move inside, edge by edge.
    """
    edges = spaced_edges(messages)

    def attempt(outside: set[tuple[int, int]]) -> tuple[list[Marked], str] | None:
        marked = mark_all(messages, outside, plane)
        try:
            rendered = render([entry.message for entry in marked])
        except UnusableRow:
            return None
        return (marked, rendered) if MARKS[plane].sub("", rendered) == text else None

    found = attempt(set(edges))
    if found:
        return found
    found = attempt(set()) if edges else None
    if not found:
        raise UnusableRow("its assistant turns cannot be located in the chat template's rendering")
    kept: set[tuple[int, int]] = set()
    for edge in edges if len(edges) > 1 else ():
        better = attempt(kept | {edge})
        if better:
            kept, found = kept | {edge}, better
    return found


def _turns(
    chat: ChatFormat, render: _Render, messages: Sequence[dict], marked: list[Marked], places: _Places, text: str
) -> list[Turn]:
    owner = {mark: i for i, entry in enumerate(marked) for mark in (*entry.opens, *entry.closes, *entry.calls)}
    by_turn: dict[int, list[int]] = {}
    seen: set[str] = set()
    for index, (mark, _) in enumerate(places):
        if mark in seen and mark in marked[owner[mark]].calls:
            continue  # the name of a call stands in its result's header too (harmony)
        if mark in owner:
            seen.add(mark)
            by_turn.setdefault(owner[mark], []).append(index)
    turns = []
    for i, indices in by_turn.items():
        first, last = indices[0], indices[-1]
        _check_order(marked[i], [places[n][0] for n in range(first, last + 1)])
        before = places[first - 1][1] if first else 0
        start = _begin(chat, render, messages, i, marked[i], places[first], before, text)
        mark, place = places[last]
        content_end = _extend_forward(text, place, marked[i].closes.get(mark, ""))
        limit = places[last + 1][1] if last + 1 < len(places) else len(text)
        end = _end_of_turn(chat, text, content_end, limit)
        turns.append(Turn(start, content_end if end is None else end, end is not None))
    for i, entry in enumerate(marked):
        if entry.calls and i not in by_turn:
            raise UnusableRow("the chat template does not show its tool calls")
    return sorted(turns, key=lambda turn: turn.start)


def _check_order(entry: Marked, found: list[str]) -> None:
    """Between a turn's first and last mark stand its own marks, each once; those of the content in rising order."""
    content = [ord(mark) for mark in found if mark not in entry.calls]
    known = all(mark in entry.opens or mark in entry.closes or mark in entry.calls for mark in found)
    if not known or len(set(found)) != len(found) or content != sorted(content):
        raise UnusableRow("the chat template repeats or reorders parts of an assistant turn")
    if entry.calls and not entry.calls & set(found):
        raise UnusableRow("the chat template does not show its tool calls")
    if not entry.calls and (found[0] not in entry.opens or found[-1] not in entry.closes):
        raise UnusableRow("the chat template repeats or reorders parts of an assistant turn")


def _begin(
    chat: ChatFormat,
    render: _Render,
    messages: Sequence[dict],
    i: int,
    entry: Marked,
    first: tuple[str, int],
    low: int,
    text: str,
) -> int:
    """Where turn `i` begins: after the generation prompt, else (templates without one) at its first own character."""
    mark, place = first
    if chat.header and (found := text.rfind(chat.header, low, place)) >= 0:
        return found + len(chat.header)
    if mark not in entry.calls:
        return _extend_back(text, place, entry.opens[mark])
    # A call begins where the same conversation with a plain answer in its place would begin to differ.
    plain = render([*messages[:i], {"role": "assistant", "content": chr(PLANES[0])}])
    start = len(os.path.commonprefix([text, plain]))  # noqa: RUF071 - characters are what is compared
    if not low <= start <= place:
        raise UnusableRow("the beginning of a tool call cannot be located in the chat template's rendering")
    return start


def _extend_back(text: str, position: int, before: str) -> int:
    """Move `position` back over `before` where the template kept it, however it changed the white space."""
    wanted = [c for c in before if not c.isspace()]
    place = position
    while wanted and place > 0:
        place -= 1
        if text[place].isspace():
            continue
        if text[place] != wanted.pop():
            return position
    return position if wanted else place


def _extend_forward(text: str, position: int, after: str) -> int:
    """Move `position` forward over `after` where the template kept it, however it changed the white space."""
    wanted = [c for c in reversed(after) if not c.isspace()]
    place = position
    while wanted and place < len(text):
        if not text[place].isspace() and text[place] != wanted.pop():
            return position
        place += 1
    return position if wanted else place


def _end_of_turn(chat: ChatFormat, text: str, content_end: int, limit: int) -> int | None:
    """Where the first end-of-turn token after a turn's content ends, or None if the template writes none there.

    Where eos follows it at once (Command-R7B: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>), the turn ends with eos.
    """
    match = next(filter(None, (pattern.search(text, content_end, limit) for pattern in chat.end_patterns)), None)
    if match is None:
        return None
    eos, end = chat.tokenizer.eos_token, match.end()
    following: re.Match[str] | None = match
    while following and following.group() != eos:
        following = following.re.match(text, following.end(), limit)
    return following.end() if following else end
