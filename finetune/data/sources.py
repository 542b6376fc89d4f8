"""Where rows come from: local .jsonl, .json and .txt files, and datasets on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMATS = "either `messages` (a list of {role, content}) or `text` (a string)"
_SUFFIXES = (".jsonl", ".json", ".txt")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Templates print these, so leaving them out would train on another conversation than the file holds.
_LATER_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class SourceRow:
    """One row as read: a conversation (`messages`) or a document (`text`), the other is None. `where` is for people."""

    where: str
    messages: tuple[dict, ...] | None = None
    text: str | None = None

    def content_key(self) -> bytes:
        """32 bytes that are equal for rows of equal content, wherever they stand."""
        content = self.text if self.messages is None else self.messages
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval, opened.

    `setting` names it in the recipe (`recipe.yaml:9: data.train`), `kind` is "chat" or "text", `identity` changes with
    its content, `read()` starts over from its first row.
    """

    name: str
    setting: str
    kind: str
    identity: str
    read: Callable[[], Iterator[SourceRow]]


def open_source(path: str, split: str, setting: str) -> Source:
    """Open a local file (`path` is absolute) or a hub dataset and recognise its format from the first row's columns.

    Reading yields rows in file order. Raises UserError, here or while reading, with file and line of what is wrong.
    """
    if os.path.isabs(path):
        file = Path(path)
        _check_file(file, split, setting)
        identity, name = _file_hash(file), file.name
        records = partial(_text_file if file.suffix == ".txt" else _json_file, file)
    else:
        dataset = _hub_dataset(path, split, setting)
        identity, name = str(dataset._fingerprint), f"{path} [{split}]"
        records = partial(_hub_rows, dataset, name)
    first = next(records(), None)
    if first is None:
        raise UserError(f"{setting}: {path} holds no rows.")
    kind = _kind(*first)
    return Source(name, setting, kind, identity, lambda: (_row(where, record, kind) for where, record in records()))


def first_rows(sources: Iterable[Source], limit: int | None) -> Iterator[tuple[int, SourceRow]]:
    """The first `limit` rows over all sources in order (all of them for None), each with its source's index."""
    left = limit
    for index, source in enumerate(sources):
        if left == 0:
            return
        for row in source.read():
            yield index, row
            left = None if left is None else left - 1
            if left == 0:
                return


def _check_file(file: Path, split: str, setting: str) -> None:
    if not file.exists():
        raise UserError(f"{setting}: {file} does not exist.")
    if file.is_dir():
        raise UserError(f"{setting}: {file} is a folder. Name a file in it ({', '.join(_SUFFIXES)}).")
    if file.suffix not in _SUFFIXES:
        raise UserError(f"{setting}: {file.name} ends in '{file.suffix}'. Local files may be {', '.join(_SUFFIXES)}.")
    if split != "train":
        raise UserError(
            f"{setting}: split is '{split}', but {file.name} is one file, which has only 'train'. Leave split out."
        )
    if not os.access(file, os.R_OK):
        raise UserError(f"{setting}: {file} cannot be read (permissions).")


def _file_hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8. Convert the file, for example with "
            "`iconv -f latin1 -t utf-8`."
        ) from error


def _text_file(file: Path) -> Iterator[tuple[str, dict]]:
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw:
        yield str(file), {"text": _decode(raw, str(file))}


def _json_file(file: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a file with one JSON object per line, or of a .json file holding one list of objects."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if file.suffix == ".json" and start.startswith(b"["):
            yield from _json_list(file)
            return
        stream.seek(0)
        for number, raw in enumerate(stream, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            where = f"{file}:{number}"
            line = _decode(raw, where)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                hint = " The file is one JSON list: name it .json." if number == 1 and start.startswith(b"[") else ""
                raise UserError(f"{where}: not a JSON object on one line: {_reason(error)}.{hint}") from error
            yield where, _as_object(where, record)


def _json_list(file: Path) -> Iterator[tuple[str, dict]]:
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        text = _decode(raw, f"{file}:{line}")
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    wants_row = False
    while True:
        position = _skip_space(text, position)
        line += text.count("\n", counted, position)
        counted, where = position, f"{file}:{line}"
        if text[position : position + 1] == "]" and not wants_row:
            rest = text[position + 1 :].strip()
            if rest:
                raise UserError(f"{where}: text after the end of the JSON list: {rest[:40]!r}.")
            return
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = text.count("\n", 0, getattr(error, "pos", position)) + 1
            raise UserError(f"{file}:{at}: not valid JSON: {_reason(error)}.") from error
        yield where, _as_object(where, record)
        position = _skip_space(text, position)
        wants_row = text[position : position + 1] == ","
        if not wants_row and text[position : position + 1] != "]":
            at = text.count("\n", 0, position) + 1
            found = repr(text[position]) if position < len(text) else "the end of the file"
            raise UserError(f"{file}:{at}: not valid JSON: expected ',' or ']' after a row, found {found}.")
        position += wants_row


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _reason(error: Exception) -> str:
    message = getattr(error, "msg", str(error))
    column = getattr(error, "colno", None)
    return f"{message} (column {column})" if column else message


def _as_object(where: str, record: object) -> dict:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a row is a JSON object with columns, found {_name(record)}. Allowed: {_FORMATS}.")
    return record


def _hub_rows(dataset, name: str) -> Iterator[tuple[str, dict]]:
    for number, record in enumerate(dataset):
        yield f"{name} row {number}", record


def _hub_dataset(path: str, split: str, setting: str):
    import datasets

    if os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{setting}: '{path}' (split '{split}') is no local file and cannot be loaded from the hub: {reason}"
        ) from error
    columns = [name for name in ("messages", "text") if name in dataset.column_names]
    # without a column of ours, the first row says so
    return dataset.select_columns(columns) if columns else dataset


def _kind(where: str, record: dict) -> str:
    if "messages" in record:
        return "chat"
    if "text" in record:
        return "text"
    raise UserError(f"{where}: the columns are {_listed(record)}. Needed: {_FORMATS}.")


def _row(where: str, record: dict, kind: str) -> SourceRow:
    column = "messages" if kind == "chat" else "text"
    if column not in record:
        raise UserError(
            f"{where}: column `{column}` is missing, the columns are {_listed(record)}. The rows before it have it."
        )
    value = record[column]
    if kind == "chat":
        return SourceRow(where, messages=_messages(where, value))
    if not isinstance(value, str):
        raise UserError(f"{where}: `text` must be a string, found {_name(value)}.")
    _check_unicode(f"{where}: `text`", value)
    return SourceRow(where, text=value)


def _messages(where: str, value: object) -> tuple[dict, ...]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _name(value)
        raise UserError(f"{where}: `messages` must be a list of {{role, content}}, found {found}.")
    messages = []
    for number, message in enumerate(value, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = _listed(message) if isinstance(message, dict) else _name(message)
            raise UserError(f"{place} must be an object with `role` and `content`, found {found}.")
        later = [key for key in _LATER_KEYS if message.get(key)]
        if later:
            raise UserError(f"{place} has `{later[0]}`, which is not supported yet. Allowed are `role` and `content`.")
        if message["role"] not in ROLES:
            raise UserError(f"{place} has role {message['role']!r}. Allowed: {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            found = _name(message["content"])
            raise UserError(f"{place} ({message['role']}): `content` must be a string, found {found}.")
        _check_unicode(f"{place}: `content`", message["content"])
        messages.append({"role": message["role"], "content": message["content"]})
    return tuple(messages)


def _check_unicode(what: str, value: str) -> None:
    # JSON can write half a surrogate pair ("\\ud800"), which no tokenizer takes
    if not value.isascii() and (found := _SURROGATE.search(value)):
        raise UserError(f"{what} holds half a character (\\u{ord(found.group()):x}, an unpaired surrogate).")


def _listed(record: dict) -> str:
    return ", ".join(f"`{key}`" for key in list(record)[:12]) or "none"


def _name(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
