"""Where this process is in its run, in words, for whoever has to say what went wrong: renewed with every micro-batch.

The ranks of one machine see each other's in a small file each, which stays behind when a process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SHARED_FOLDER = "FINETUNE_RANKS_FOLDER"  # environment variable: the folder of one launch, from `finetune train`
_RECORD_BYTES = 1024  # written at once, so that a reader sees the old record or the new one
_MOST_ROWS = 16


@dataclass(frozen=True)
class Place:
    """What a rank's main thread does since `time` (Unix seconds); `beat` counts such entries. At `alive` its process
    last ran.
    """

    rank: int
    pid: int
    host: str
    beat: int = 0
    words: str = ""  # "": not in a run yet
    time: float = 0.0
    alive: float = 0.0
    ranks: int = 1
    machines: int = 1
    slow: bool = False  # what it does may take much longer than a micro-batch

    def __str__(self) -> str:
        """`rank 1 on node7, window 3 ...`; what goes without saying is left out."""
        name = f"rank {self.rank}" + (f" on {self.host}" if self.machines > 1 else "")
        return ", ".join(filter(None, (name if self.ranks > 1 or not self.words else "", self.words)))


def shared_folder() -> Path | None:
    """Where the ranks of this launch on this machine leave word of themselves; None where no launcher made such a
    place.
    """
    if folder := os.environ.get(SHARED_FOLDER):
        return Path(folder)
    # torchrun makes <temporary>/<run>/attempt_0/<local rank>/error.json
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[1] if error_file else None


class _Record:
    """This process's place, and its file."""

    def __init__(self) -> None:
        ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self.place = Place(
            int(os.environ.get("RANK", "0")),
            os.getpid(),
            socket.gethostname(),
            ranks=ranks,
            machines=max(1, ranks // local),
        )
        folder = shared_folder()
        self.handle = None
        with contextlib.suppress(OSError):  # nobody to tell, or no room to: the run goes on
            self.handle = folder and os.open(folder / f"place-{self.place.rank}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self.move("")

    def move(self, words: str, slow: bool = False) -> None:
        self.place = replace(self.place, beat=self.place.beat + 1, words=words, time=time.time(), slow=slow)
        if self.handle is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self.handle, json.dumps(asdict(self.place))[:_RECORD_BYTES].encode().ljust(_RECORD_BYTES), 0)

    def touch(self) -> None:
        if self.handle is not None:
            with contextlib.suppress(OSError):
                os.utime(self.handle)


_record: _Record | None = None


def at(words: str, rows: Sequence[int] | None = None, shape: Sequence[int] = (), slow: bool = False) -> None:
    """From now on this process does what `words` say, with these rows of the data as a batch of this shape. Some
    microseconds.

    `slow` says that it may take much longer than a micro-batch: the watchdog then waits longer.
    """
    global _record
    _record = _record or _Record()
    if rows is not None:
        names = f"{'row' if len(rows) == 1 else 'rows'} {row_numbers(rows)}" if rows else "no rows"
        words += f", {names} ({' x '.join(map(str, shape))} tokens)"
    _record.move(words, slow)


def row_numbers(rows: Sequence[int]) -> str:
    """`3, 9`: the first of them, counted from 0."""
    return ", ".join(map(str, rows[:_MOST_ROWS])) + (" ..." if len(rows) > _MOST_ROWS else "")


def here() -> Place:
    """This process's place."""
    global _record
    _record = _record or _Record()
    return _record.place


def alive() -> None:
    """This process runs, whatever its main thread does."""
    if _record is not None:
        _record.touch()


def others() -> list[Place]:
    """What the other ranks of this launch on this machine last did."""
    folder = shared_folder()
    return [place for place in places(folder) if place.rank != here().rank] if folder else []


def places(folder: Path) -> list[Place]:
    """The places that ranks left in a launch's folder, by rank."""
    found = []
    for file in folder.glob("place-*.json"):
        try:
            found.append(replace(Place(**json.loads(file.read_text())), alive=file.stat().st_mtime))
        except ValueError:  # nothing written yet
            continue
    return sorted(found, key=lambda place: place.rank)
