"""What this process is doing, in words, renewed with every micro-batch: error messages and the watchdog read it.

Each rank writes it to a small file that the other ranks of its machine can read; the file stays when a process is
killed.
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
class RankStatus:
    """What a rank's main thread is doing, since `time` (Unix seconds).

    `count` counts these entries; `alive` is when the process last ran (Unix seconds).
    """

    rank: int
    pid: int
    host: str
    count: int = 0
    activity: str = ""  # empty: not in a run yet
    time: float = 0.0
    alive: float = 0.0
    ranks: int = 1
    machines: int = 1
    slow: bool = False  # what it does may take much longer than a micro-batch

    def __str__(self) -> str:
        """`rank 1 on node7, window 3 ...`; without the host on one machine, without the rank in one process."""
        name = f"rank {self.rank}" + (f" on {self.host}" if self.machines > 1 else "")
        return ", ".join(filter(None, (name if self.ranks > 1 or not self.activity else "", self.activity)))


def shared_folder() -> Path | None:
    """The folder that the ranks of this launch share on this machine; None where no launcher made one."""
    if folder := os.environ.get(SHARED_FOLDER):
        return Path(folder)
    # torchrun makes <temporary>/<run>/attempt_0/<local rank>/error.json
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[1] if error_file else None


class _Record:
    """The state of this process, and its file."""

    def __init__(self) -> None:
        ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self.status = RankStatus(
            int(os.environ.get("RANK", "0")),
            os.getpid(),
            socket.gethostname(),
            ranks=ranks,
            machines=max(1, ranks // local),
        )
        folder = shared_folder()
        self.handle: int | None = None
        if folder is not None:
            with contextlib.suppress(OSError):  # no folder or no room: the run goes on
                self.handle = os.open(folder / f"status-{self.status.rank}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self.move("")

    def move(self, activity: str, slow: bool = False) -> None:
        """Record that the main thread now does `activity`."""
        self.status = replace(self.status, count=self.status.count + 1, activity=activity, time=time.time(), slow=slow)
        if self.handle is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self.handle, json.dumps(asdict(self.status))[:_RECORD_BYTES].encode().ljust(_RECORD_BYTES), 0)

    def touch(self) -> None:
        """Record that the process runs."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                os.utime(self.handle)


_record: _Record | None = None


def update(activity: str, rows: Sequence[int] | None = None, shape: Sequence[int] = (), slow: bool = False) -> None:
    """Record that this process now does `activity`, with these `rows` as a batch of this `shape`.

    `slow` says that it may take much longer than a micro-batch: the watchdog then waits longer. Takes microseconds.
    """
    global _record
    _record = _record or _Record()
    if rows is not None:
        names = f"{'row' if len(rows) == 1 else 'rows'} {row_numbers(rows)}" if rows else "no rows"
        activity += f", {names} ({' x '.join(map(str, shape))} tokens)"
    _record.move(activity, slow)


def row_numbers(rows: Sequence[int]) -> str:
    """`3, 9`: row numbers for a message, the first 16 of them."""
    return ", ".join(map(str, rows[:_MOST_ROWS])) + (" ..." if len(rows) > _MOST_ROWS else "")


def own_status() -> RankStatus:
    """What this process is doing."""
    global _record
    _record = _record or _Record()
    return _record.status


def alive() -> None:
    """Record that this process runs, whatever its main thread does."""
    if _record is not None:
        _record.touch()


def other_statuses() -> list[RankStatus]:
    """What the other ranks of this launch on this machine were doing when they last wrote it."""
    folder = shared_folder()
    return [status for status in rank_statuses(folder) if status.rank != own_status().rank] if folder else []


def rank_statuses(folder: Path) -> list[RankStatus]:
    """What the ranks wrote to a launch's folder, by rank."""
    found = []
    for file in folder.glob("status-*.json"):
        try:
            found.append(replace(RankStatus(**json.loads(file.read_text())), alive=file.stat().st_mtime))
        except ValueError:  # nothing written yet
            continue
    return sorted(found, key=lambda status: status.rank)
