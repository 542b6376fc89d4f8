"""Rows of local files: .jsonl, .json, .csv, .tsv, .parquet and .txt, each also as .gz, and folders of them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from finetune.data.file_hashes import file_hash
from finetune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_BOM = b"\xef\xbb\xbf"
# Names that mark the files of one split, as in data/train-00000-of-00004.parquet or test/part.jsonl.
_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "validation": "validation"}
_SPLIT_NAMES |= dict.fromkeys(("valid", "val", "dev", "eval"), "validation")

Record = tuple[str, dict]  # where it stands, for people; the columns of a row


def suffix_of(file: Path) -> str:
    """The suffix that says what a file holds, lower case, without .gz."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def expand(path: Path, split: str, setting: str) -> list[Path]:
    """The data files at `path`, a file or a folder, in the order of their names.

    In a folder whose file or folder names begin with train, test or validation, only those of `split` count. Raises
    UserError (naming `setting`) when nothing there can be read as data.
    """
    if not path.exists():
        raise UserError(f"{setting}: {path} does not exist.")
    if path.is_dir():
        return _in_folder(path, split, setting)
    if suffix_of(path) not in SUFFIXES:
        raise UserError(
            f"{setting}: {path.name} ends in '{path.suffix}'. Local files may be {', '.join(SUFFIXES)}, or .gz of them."
        )
    if split != "train":
        raise UserError(
            f"{setting}: split is '{split}', but {path.name} is one file, which has only 'train'. Leave split out."
        )
    return [_readable(path, setting)]


def _in_folder(folder: Path, split: str, setting: str) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if suffix_of(file) in SUFFIXES and file.is_file()
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"{setting}: {folder} is a folder without data files ({', '.join(SUFFIXES)}, or .gz of them).")
    of_split: dict[str | None, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split_name(file.relative_to(folder)), []).append(file)
    if set(of_split) == {None}:
        if split != "train":
            raise UserError(f"{setting}: split is '{split}', but no file name in {folder} begins with a split's name.")
        return [_readable(file, setting) for file in files]
    wanted = _SPLIT_NAMES.get(split, split)
    if wanted not in of_split:
        found = ", ".join(sorted(name for name in of_split if name))
        raise UserError(f"{setting}: split is '{split}', but the files in {folder} are of {found}. Name one of those.")
    return [_readable(file, setting) for file in of_split[wanted]]


def _split_name(file: Path) -> str | None:
    words = (re.split(r"[^a-z]", part.lower(), maxsplit=1)[0] for part in reversed(file.parts))
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)


def _readable(file: Path, setting: str) -> Path:
    if not os.access(file, os.R_OK):
        raise UserError(f"{setting}: {file} cannot be read (permissions).")
    return file


def content_hash(files: list[Path]) -> str:
    """Hex digest of the files' contents, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{suffix_of(file)} {file_hash(file)} ".encode())
    return digest.hexdigest()


def read_files(files: list[Path]) -> Iterator[Record]:
    """The rows of the files, in order. Raises UserError with file and line of what is wrong."""
    readers = {".txt": _text, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".json": _json, ".jsonl": _json_lines}
    for file in files:
        last = f"{file}"
        try:
            for where, record in readers[suffix_of(file)](file):
                last = where
                yield where, record
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            place = last if last == str(file) else f"{last} (the last row that could be read)"
            raise UserError(f"{place}: the gzip file is damaged or cut short: {error}. Copy it again.") from error


def _open(file: Path) -> io.BufferedIOBase:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


def _whole(file: Path) -> bytes:
    with _open(file) as stream:
        return stream.read().removeprefix(_BOM)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise UserError(
            f"{where}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8. Convert the file, for example with "
            f"`iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8`."
        ) from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _open(file) as stream:
        for number, raw in enumerate(stream, 1):
            yield number, _decode(raw.removeprefix(_BOM) if number == 1 else raw, f"{file}:{number}")


def _text(file: Path) -> Iterator[Record]:
    raw = _whole(file)
    if raw:
        line = raw.count(b"\n", 0, _bad_byte(raw)) + 1
        yield str(file), {"text": _decode(raw, f"{file}:{line}" if line > 1 else str(file))}


def _bad_byte(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if suffix_of(file) == ".tsv" else ","
    # strict: a quote that is never closed would otherwise swallow the rest of the file
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            where, line = f"{file}:{line}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _header(where, [field.strip() for field in fields])
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{where}: the row has {len(fields)} fields, the header has {len(header)}. Quote fields"
                    " that hold the delimiter, a line end or a quote."
                )
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{line}: not valid CSV: {error}.") from error


def _header(where: str, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = f"has `{twice[0]}` twice" if twice and twice[0] else "has a column without a name"
        raise UserError(f"{where}: the header {what}. The first line names the columns.")
    return names


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    if file.name.lower().endswith(".gz"):
        raise UserError(f"{file}: a parquet file is compressed inside; unpack the .gz around it.")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{file}: not a readable parquet file: {reason}") from error


def _json(file: Path) -> Iterator[Record]:
    """A .json file: one list of objects, or one object per line."""
    with _open(file) as stream:
        start = stream.read(4096).removeprefix(_BOM).lstrip()
    yield from _json_list(file) if start.startswith(b"[") else _json_lines(file)


def _json_lines(file: Path) -> Iterator[Record]:
    for number, line in _lines(file):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = ""
            if number == 1 and line.lstrip().startswith("["):
                hint = " The file is one JSON list: name it .json."
            elif line.strip() == "{":
                hint = " A row is one object on one line; a .json file may also be one list of objects."
            raise UserError(f"{where}: not a JSON object on one line: {_reason(error)}.{hint}") from error
        yield where, _as_object(where, record)


def _json_list(file: Path) -> Iterator[Record]:
    raw = _whole(file)
    bad = _bad_byte(raw)
    text = _decode(raw, f"{file}:{raw.count(bytes([10]), 0, bad) + 1}")
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
        found = {type(None): "null", bool: "a boolean", str: "a string", list: "a list"}.get(type(record), "a number")
        raise UserError(f"{where}: a row is a JSON object with columns, found {found}.")
    return record
