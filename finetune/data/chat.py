"""Where the assistant speaks: character spans of assistant turns in a chat template's rendering.

Any template works, with or without `{% generation %}` marks, because nothing is read from the template. A conversation
is rendered twice: as it is, and with single private-use characters set into the contents of its messages. When the
second rendering without those characters equals the first, their places say exactly which characters of the first
came from which message. Spans always belong to the full rendering: templates may strip contents or rewrite history
(Qwen3 drops the thinking of earlier turns), so the rendering of the first n messages is not a prefix of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import jinja2

# Templates look for tags such as </think> or [TOOL_CALLS] inside contents and cut there, so tags are never marked.
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z_]{1,40}\]")
_MARK_PLANES = (0xF0000, 0x100000)
_MARKS_PER_PLANE = 0xFFF0
_MARKS = {p: re.compile(f"[{chr(p)}-{chr(p + _MARKS_PER_PLANE)}]") for p in _MARK_PLANES}
# Templates that print today's date would give other tokens on another day: every rendering sees this one.
_TEMPLATE_DATE = datetime(2024, 7, 26)


class NotLocated(Exception):
    """A conversation that cannot become a training row; the text says why. The row counts as dropped."""


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


@dataclass(frozen=True)
class _Marked:
    """A message's content with marks set, and what is needed to find the content's edges again.

    `opens` and `closes` map a mark to the piece of content that precedes or follows it up to the trained edge.
    """

    content: str
    opens: dict[str, str] = field(default_factory=dict)
    closes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's chat template, made ready to render.

    `template` is the Jinja text, `end_patterns` find an end-of-turn token in the text after a turn, best first.
    """

    tokenizer: object
    template: str
    end_patterns: tuple[re.Pattern[str], ...]

    def render(self, messages: Sequence[dict]) -> str:
        """The conversation as text. Raises NotLocated when the template refuses it (its own words)."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, tokenize=False)
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise NotLocated(f"the chat template refuses it: {' '.join(str(error).split())[:160]}") from error


def chat_format(tokenizer) -> ChatFormat:
    """The chat format of a Hugging Face tokenizer that has a chat template.

    Raises ValueError (from transformers) when there is none.
    """
    special, added = set(), set()
    for token in tokenizer.added_tokens_decoder.values():
        (special if token.special else added).add(token.content)
    if tokenizer.eos_token:
        special.add(tokenizer.eos_token)
    # A beginning-of-text token after a turn opens the next one; it ends nothing unless it doubles as eos.
    if tokenizer.bos_token != tokenizer.eos_token:
        special.discard(tokenizer.bos_token)
    # Some vocabularies list <|im_end|> as an ordinary added token: looked for only where no special one stands.
    patterns = tuple(
        re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
        for texts in (special, {text for text in added if text.strip()})
        if texts
    )
    return ChatFormat(tokenizer, _with_fixed_date(tokenizer.get_chat_template()), patterns)


def render_turns(chat: ChatFormat, messages: Sequence[dict]) -> Rendered:
    """Render a conversation and locate every assistant turn in it.

    Returns the text and one Turn per assistant message that the template shows, in order. Raises NotLocated when the
    template refuses the conversation or changes contents beyond recognition.
    """
    text = chat.render(messages)
    plane = next((p for p in _MARK_PLANES if not _MARKS[p].search(text)), None)
    if plane is None:
        raise NotLocated("its text uses the private-use characters needed to find the assistant turns")
    marked, marked_text = _mark_like(chat, messages, text, plane)
    places = [(m.group(), m.start() - n) for n, m in enumerate(_MARKS[plane].finditer(marked_text))]
    return Rendered(text, _turns(chat, marked, places, text))


def _mark_like(chat: ChatFormat, messages: Sequence[dict], text: str, plane: int) -> tuple[list[_Marked], str]:
    """Marked contents whose rendering, marks removed, is `text`; and that rendering.

    White space at the edges of an assistant's content belongs to the turn where the template keeps it. The marks go
    outside it first; a template that strips then renders differently, and the marks move inside, edge by edge.
    """
    edges = [
        (i, side)
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (body := message["content"].strip())
        for side in (0, 1)
        if not (message["content"].endswith(body) if side else message["content"].startswith(body))
    ]

    def attempt(outside: set[tuple[int, int]]) -> tuple[list[_Marked], str] | None:
        marked = _mark_all(messages, outside, plane)
        contents = [{**message, "content": mark.content} for message, mark in zip(messages, marked)]
        try:
            rendered = chat.render(contents)
        except NotLocated:
            return None
        return (marked, rendered) if _MARKS[plane].sub("", rendered) == text else None

    found = attempt(set(edges))
    if found:
        return found
    found = attempt(set()) if edges else None
    if not found:
        raise NotLocated("its assistant turns cannot be located in the chat template's rendering")
    kept: set[tuple[int, int]] = set()
    for edge in edges if len(edges) > 1 else ():
        better = attempt(kept | {edge})
        if better:
            kept, found = kept | {edge}, better
    return found


def _mark_all(messages: Sequence[dict], outside: set[tuple[int, int]], plane: int) -> list[_Marked]:
    marks = iter(range(plane, plane + _MARKS_PER_PLANE))

    def next_mark() -> str:
        number = next(marks, None)
        if number is None:
            raise NotLocated("it has too many tags to find the assistant turns")
        return chr(number)

    result = []
    for i, message in enumerate(messages):
        content = message["content"]
        low = len(content) - len(content.lstrip())
        high = max(low, len(content.rstrip()))
        if message["role"] != "assistant":
            # Only where another message begins matters: no end-of-turn token is looked for beyond it.
            start = _segments(content, low, high)[0][0]
            result.append(_Marked(content[:start] + next_mark() + content[start:]))
            continue
        low = 0 if (i, 0) in outside else low
        high = len(content) if (i, 1) in outside else high
        pieces, opens, closes, done = [], {}, {}, 0
        for start, end in _segments(content, low, high):
            opening, closing = next_mark(), next_mark()
            opens[opening], closes[closing] = content[low:start], content[end:high]
            pieces += [content[done:start], opening, content[start:end], closing]
            done = end
        result.append(_Marked("".join(pieces) + content[done:], opens, closes))
    return result


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


def _turns(chat: ChatFormat, marked: list[_Marked], places: list[tuple[str, int]], text: str) -> tuple[Turn, ...]:
    owner = {mark: i for i, entry in enumerate(marked) for mark in (*entry.opens, *entry.closes)}
    by_turn: dict[int, list[tuple[str, int]]] = {}
    for mark, place in places:
        if mark in owner:
            by_turn.setdefault(owner[mark], []).append((mark, place))
    turns = []
    for i, own in by_turn.items():
        ordered = [ord(mark) for mark, _ in own]
        first, last = own[0], own[-1]
        if ordered != sorted(set(ordered)) or first[0] not in marked[i].opens or last[0] not in marked[i].closes:
            raise NotLocated("the chat template repeats or reorders parts of an assistant turn")
        start = _extend_back(text, first[1], marked[i].opens[first[0]])
        content_end = _extend_forward(text, last[1], marked[i].closes[last[0]])
        beyond = places[places.index(last) + 1 :]
        end = _end_of_turn(chat, text, content_end, beyond[0][1] if beyond else len(text))
        turns.append(Turn(start, content_end if end is None else end, end is not None))
    return tuple(sorted(turns, key=lambda turn: turn.start))


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
    eos, end, following = chat.tokenizer.eos_token, match.end(), match
    while following and following.group() != eos:
        following = following.re.match(text, following.end(), limit)
    return following.end() if following else end


def _with_fixed_date(template: str) -> str:
    """The template with `strftime_now` answering for one fixed date, so that a row has the same tokens every day."""
    if "strftime_now" not in template:
        return template
    formats = set(re.findall(r"strftime_now\(\s*[\"']([^\"']+)[\"']", template)) | {"%d %b %Y"}
    dates = ", ".join(f"{form!r}: {_TEMPLATE_DATE.strftime(form)!r}" for form in sorted(formats))
    default = _TEMPLATE_DATE.strftime("%Y-%m-%d")
    return (
        "{%- macro strftime_now(format) -%}{{- {" + dates + "}.get(format, " + repr(default) + ") -}}{%- endmacro -%}"
        + template
    )
