"""Hashes of files, remembered: a file that looks as it did when it was hashed is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from finetune.data.token_cache import root

# A file may change again within a tick of its file system's clock and look the same: changes must be older than this.
SETTLED_SECONDS = 2.0
Look = list[int]  # device, inode, size, mtime_ns, ctime_ns


def file_hash(file: Path) -> str:
    """Hex sha256 of the file's content, remembered beside the token cache. Raises OSError where it cannot be read.

    The kernel sets a file's ctime at every change of its content, name or rights, and no program can set it back.
    """
    note = root().parent / "hashes" / f"{hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:32]}.json"
    look = _look(file)
    settled = time.time() - max(look[3:]) / 1e9 > SETTLED_SECONDS
    if settled and (known := _read(note)) and known[0] == look:
        return known[1]
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if settled and _look(file) == look:
        _write(note, look, digest.hexdigest())
    return digest.hexdigest()


def _look(file: Path) -> Look:
    seen = file.stat()
    return [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]


def _read(note: Path) -> tuple[Look, str] | None:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        return known["look"], str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(note: Path, look: Look, digest: str) -> None:
    # a cache folder that cannot be written costs the time of hashing, no more
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"look": look, "sha256": digest}), encoding="utf-8")
        temporary.replace(note)
