"""What a row is, read off its columns: messages, ShareGPT, Alpaca, prompt/completion, preference pairs or text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.data.messages import as_messages, as_tools, check_unicode, kind_name
from finetune.errors import UserError
from finetune.recipe.row_formats import FORMATS

# Other names in wide use, taken where ours is missing.
_ALIASES = {"output": "response", "completion": "response", "input": "context", "messages": "conversation"}
_NEEDED = (
    "`messages` (a list of {role, content}), `conversations` (a list of {from, value}), `instruction` and `output`,"
    " `prompt` and `completion`, or `text`"
)


@dataclass(frozen=True)
class SourceRow:
    """One row as read: a conversation (`messages`, with `tools`) or a document (`text`); the other is None.

    `where` names file and line for messages.
    """

    where: str
    messages: tuple[dict, ...] | None = None
    text: str | None = None
    tools: tuple[dict, ...] | None = None

    def content_key(self) -> bytes:
        """32 bytes that are equal for rows of equal content, wherever they stand."""
        content = self.text if self.messages is None else [self.messages, self.tools]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class SourceFormat:
    """The format of a source: `columns` maps our column names to the source's, `unused` are those nothing reads.

    `kind` is "chat" (goes through the chat template), "pair" (prompt and completion as plain strings: through the
    template where the tokenizer has one) or "text". `system` is the system prompt of rows that bring none.
    """

    format: str
    kind: str
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    system: str | None = None


def recognise(where: str, record: dict, wanted: str, mapping: Mapping[str, str], system: str | None) -> SourceFormat:
    """The shape of a source from its first row; `wanted` is a format or "auto", `mapping` {our column: theirs}.

    Raises UserError when the columns fit no format, or not the wanted one.
    """
    for ours, theirs in mapping.items():
        if theirs not in record:
            raise UserError(f"{where}: `columns` maps {ours} to `{theirs}`, but the columns are {listed(record)}.")
    for name in FORMATS if wanted == "auto" else (wanted,):
        needed, more = FORMATS[name]
        columns = {ours: found for ours in (*needed, *more) if (found := _theirs(ours, record, mapping))}
        if all(ours in columns for ours in needed):
            break
    else:
        raise UserError(_no_format(where, record, wanted))
    unused = tuple(column for column in record if column not in columns.values())
    kind = {"text": "text", "prompt_completion": "pair"}.get(name, "chat")
    if kind == "pair" and not all(isinstance(record[columns[ours]], str) for ours in needed):
        kind = "chat"
    return SourceFormat(name, kind, columns, unused, system)


def _theirs(ours: str, record: Mapping, mapping: Mapping[str, str]) -> str | None:
    if ours in mapping:
        return mapping[ours]
    if ours in record and ours not in mapping.values():
        return ours
    alias = _ALIASES.get(ours)
    return alias if alias in record and alias not in mapping.values() else None


def _no_format(where: str, record: dict, wanted: str) -> str:
    found = f"{where}: the columns are {listed(record)}."
    if wanted != "auto":
        needed = " and ".join(f"`{name}`" for name in FORMATS[wanted][0])
        return f"{found} format: {wanted} needs {needed}; name other columns with `columns: {{ours: theirs}}`."
    guesses = (("question", "answer"), ("query", "response"), ("input", "output"), ("prompt", "answer"))
    guess = next((pair for pair in guesses if all(name in record for name in pair)), None)
    columns = f"prompt: {guess[0]}, completion: {guess[1]}" if guess else "ours: theirs"
    example = f"columns: {{{columns}}}"
    return f"{found} Needed: {_NEEDED}. Name other columns in the source with `{example}`."


def to_row(where: str, record: dict, shape: SourceFormat) -> SourceRow:
    """One record in a known shape. Raises UserError with `where` when it does not fit."""
    needed, more = FORMATS[shape.format]
    values = {}
    for name in needed:
        theirs = shape.columns[name]
        if theirs not in record:
            raise UserError(
                f"{where}: column `{theirs}` is missing, the columns are {listed(record)}. The rows before it have it."
            )
        values[name] = record[theirs]
    for name in more:
        values[name] = record.get(shape.columns.get(name, name))
    if shape.format == "text":
        return SourceRow(where, text=_string(where, shape, "text", values["text"]))
    messages = _READERS[shape.format](where, shape, values)
    if not any(message["role"] == "system" for message in messages):
        system = _string(where, shape, "system", values.get("system"), optional=True) or shape.system
        messages = ([{"role": "system", "content": system}] if system else []) + messages
    tools = as_tools(f"{where}: `{shape.columns.get('tools', 'tools')}`", values.get("tools"))
    return SourceRow(where, messages=tuple(messages), tools=tools)


def _conversation(column: str) -> Callable[[str, SourceFormat, dict], list[dict]]:
    return lambda where, shape, values: as_messages(where, shape.columns[column], values[column])


def _alpaca(where: str, shape: SourceFormat, values: dict) -> list[dict]:
    instruction = _string(where, shape, "instruction", values["instruction"])
    extra = _string(where, shape, "input", values["input"], optional=True)
    question = f"{instruction}\n{extra}" if extra else instruction
    messages = []
    for number, turn in enumerate(values["history"] or [], 1):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UserError(f"{where}: `history` turn {number} must be a list of a question and an answer.")
        pair = [_string(where, shape, "history", part) for part in turn]
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = _string(where, shape, "output", values["output"])
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt_completion(where: str, shape: SourceFormat, values: dict) -> list[dict]:
    if shape.kind == "pair":
        asked, answer = (_string(where, shape, name, values[name]) for name in ("prompt", "completion"))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    prompt = as_messages(where, shape.columns["prompt"], _listened(values["prompt"], "user"))
    return prompt + as_messages(where, shape.columns["completion"], _listened(values["completion"], "assistant"))


def _preference(where: str, shape: SourceFormat, values: dict) -> list[dict]:
    """The conversation with the preferred answer: what supervised fine-tuning learns from a preference pair."""
    chosen = as_messages(where, shape.columns["chosen"], _listened(values["chosen"], "assistant"))
    before = next((name for name in ("messages", "conversations", "prompt") if values[name] is not None), None)
    if before is None:
        if len(chosen) < 2:
            raise UserError(
                f"{where}: `{shape.columns['chosen']}` is an answer without a question; a preference row"
                " needs `prompt`, `messages` or `conversations` too."
            )
        return chosen
    context = as_messages(where, shape.columns.get(before, before), _listened(values[before], "user"))
    # some sets repeat the prompt at the head of `chosen`
    return chosen if chosen[: len(context)] == context and len(chosen) > len(context) else context + chosen


def _listened(value: object, role: str) -> object:
    """A string or a single message as a list of messages."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _string(where: str, shape: SourceFormat, name: str, value: object, optional: bool = False) -> str:
    if optional and value is None:
        return ""
    column = shape.columns.get(name, name)
    if not isinstance(value, str):
        raise UserError(f"{where}: `{column}` must be a string, found {kind_name(value)}.")
    check_unicode(f"{where}: `{column}`", value)
    return value


def listed(record: Mapping) -> str:
    """The names of a row's columns, for a message."""
    return ", ".join(f"`{key}`" for key in list(record)[:12]) or "none"


_READERS: dict[str, Callable[[str, SourceFormat, dict], list[dict]]] = {
    "messages": _conversation("messages"),
    "sharegpt": _conversation("conversations"),
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
}
