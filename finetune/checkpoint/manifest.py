"""Decides whether a checkpoint is whole: manifest.json, its writing, and the comparison with what is there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(0|[1-9][0-9]*)(\.tmp|\.old|\.aside)?")  # a checkpoint's folder
CHUNK_BYTES = 4 << 20
THREADS = 4  # hashlib lets other threads run while it works
SHOWN = 5  # files or problems named in one message

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Digest:
    """What a file must be: its sha256 (hexadecimal) and its length in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint folder. `facts` and `files` are empty where the manifest cannot be trusted; `problems` then says
    why.
    """

    step: int
    folder: Path
    facts: dict
    files: dict[str, Digest]
    problems: tuple[str, ...] = ()


def digest(folder: Path, names: Iterable[str], threads: int = THREADS) -> dict[str, Digest]:
    """Digests of these files of `folder` (names relative to it); they and their folders are fsynced. Raises OSError."""
    names = list(names)
    digests = dict(zip(names, _parallel(lambda name: _digest(folder / name, sync=True), names, threads), strict=True))
    for parent in sorted({p for name in names for p in (folder / name).parents if p == folder or folder in p.parents}):
        sync_folder(parent)
    return digests


def write_manifest(folder: Path, step: int, facts: dict, files: dict[str, Digest]) -> None:
    """Seal `files` (and nothing else) as the content of step `step`. Raises OSError, ValueError for facts that are not
    JSON.
    """
    entries = {name: asdict(entry) for name, entry in files.items()}
    document = {"format": FORMAT, "step": step, "facts": facts, "files": entries}
    write_synced(folder / MANIFEST, _render(document))


def verify(folder: Path, hashes: bool = True, threads: int = THREADS) -> list[str]:
    """What is wrong with a checkpoint folder, file by file, in words; empty: it is as it was sealed.

    Without `hashes` names and lengths are compared and no contents are read. Never raises for what lies on the disk.
    """
    return list(examine(folder, hashes, threads).problems)


def examine(folder: Path, hashes: bool, threads: int = THREADS) -> Snapshot:
    """The folder as a Snapshot, with its problems: see `verify`."""
    match = NAME.fullmatch(folder.name)
    assert match is not None, folder
    step = int(match[1])
    try:
        facts, files = _read_manifest(folder, step)
        found, odd = walk(folder)
    except (OSError, ValueError) as error:
        return Snapshot(step, folder, {}, {}, (_words(error),))
    problems = [f"{name} is neither a file nor a folder (symbolic links are refused)" for name in odd]
    problems += [f"{name} is missing" for name in sorted(files.keys() - found.keys() - set(odd))]
    problems += [f"{name} is not in {MANIFEST}" for name in sorted(found.keys() - files.keys() - {MANIFEST})]
    same = sorted(files.keys() & found.keys())
    problems += [f"{n} has {found[n]} bytes instead of {files[n].bytes}" for n in same if found[n] != files[n].bytes]
    if hashes:
        same = [n for n in same if found[n] == files[n].bytes]
        wrong = _parallel(lambda name: changed(folder, name, files[name]), same, threads)
        problems += [problem for problem in wrong if problem]
    return Snapshot(step, folder, facts, files, tuple(problems))


def _read_manifest(folder: Path, step: int) -> tuple[dict, dict[str, Digest]]:
    """(facts, files). Raises OSError, or ValueError with the problem in words."""
    if folder.is_symlink():
        raise ValueError("the folder is a symbolic link")
    if not stat.S_ISREG((folder / MANIFEST).lstat().st_mode):  # to read a pipe would wait for ever
        raise ValueError(f"{MANIFEST} is no plain file")
    raw = (folder / MANIFEST).read_bytes()
    try:
        document = json.loads(raw)
        newer = document["format"] > FORMAT
        if not newer:
            intact = raw == _render(document)
            found_step, facts = document["step"], dict(document["facts"])
            files = {name: Digest(**entry) for name, entry in document["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST} is not readable") from None
    if newer:
        raise ValueError(f"{MANIFEST} has format {document['format']}, this version reads {FORMAT}")
    if not intact:
        raise ValueError(f"{MANIFEST} was changed after it was written: its sha256 differs")
    if found_step != step:
        raise ValueError(f"{MANIFEST} belongs to step {found_step}, the folder to step {step}")
    if wrong := [name for name in files if not is_plain(name)]:
        raise ValueError(f"{MANIFEST} names files outside the folder: {some(wrong)}")
    return facts, files


def _render(document: dict) -> bytes:
    """The one way to write a manifest, with the sha256 of the rest inside: any other byte is damage."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, indent=1, sort_keys=True, allow_nan=False)
    document = rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


# ---- files and folders


def walk(folder: Path) -> tuple[dict[str, int], list[str]]:
    """(bytes of every plain file by its name inside `folder`, names of links, pipes and the like). Raises OSError."""
    files, odd, todo = {}, [], [folder]
    while todo:
        for path in sorted(todo.pop().iterdir()):
            status, name = path.lstat(), path.relative_to(folder).as_posix()
            if stat.S_ISDIR(status.st_mode):
                todo.append(path)
            elif stat.S_ISREG(status.st_mode):
                files[name] = status.st_size
            else:
                odd.append(name)
    return files, odd


def is_plain(name: str) -> bool:
    """Whether a file's name in a manifest stays inside the folder: relative, no `..`, no manifest of its own."""
    parts = name.split("/")
    return name != MANIFEST and not {"", ".", ".."} & set(parts) and "\\" not in name and "\0" not in name


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network filesystems know no fsync of folders: they write names at once
            raise
    finally:
        os.close(handle)


def some(texts: Iterable[str], between: str = ", ") -> str:
    """The first few, and how many more there are."""
    texts = list(texts)
    more = f"{between}and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return between.join(texts[:SHOWN]) + more


def _words(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    return (
        f"{Path(error.filename).name} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
    )


def _digest(path: Path, sync: bool = False) -> Digest:
    """Streams the file. The length is that of the bytes read."""
    sha256, read_bytes, buffer = hashlib.sha256(), 0, bytearray(CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while count := file.readinto(buffer):
            sha256.update(memoryview(buffer)[:count])
            read_bytes += count
    return Digest(sha256.hexdigest(), read_bytes)


def changed(folder: Path, name: str, expected: Digest) -> str | None:
    """What is wrong with the content of one file, in words, or None."""
    try:
        return None if _digest(folder / name) == expected else f"{name}: its sha256 differs"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _parallel(work: Callable[[Item], Result], items: list[Item], threads: int) -> list[Result]:
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(work, items))
