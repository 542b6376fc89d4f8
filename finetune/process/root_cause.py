"""How the ranks of a launch ended, and which of them failed first: its words are the ones that are said.

Each failing rank leaves its end in a folder that the ranks of one machine share (whereabouts.py), before anything else:
others fail because of it, soon, and often louder."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from finetune.process import heartbeat

GRACE_SECONDS = 10.0  # for rank 0, which speaks where all ranks met the same, and for the first to have spoken
SETTLE_SECONDS = 2.0  # for a peer's own word, or for its process to be gone, after a connection broke
# What gloo, NCCL and torch's store say where another process has gone or never came. Not a cause, but what follows from
# one.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "connection was likely closed",
    "timed out waiting",
    "caused pair closure",
    "remote process exited",
    "communicator was aborted",
    "ncclremoteerror",
    "heartbeat monitor",
    "socket timeout",
)
_LOST_TYPES = (
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
)  # torch.distributed's, by name: nothing here imports torch


@dataclass(frozen=True)
class End:
    """How one rank ended, at `time` (Unix seconds), with which exit status and last words."""

    rank: int
    pid: int
    time: float
    code: int
    message: str
    lost_peer: bool = False  # it only noticed that another rank had gone
    alone: bool = False  # this rank's own trouble, which the others do not meet themselves

    @property
    def words(self) -> str:
        """The message, with the rank that says it where that is not rank 0 and not in the message."""
        return (
            self.message
            if self.rank == 0 or f"rank {self.rank}" in self.message
            else f"[rank {self.rank}] {self.message}"
        )


def is_lost_peer(error: BaseException) -> bool:
    """Whether this exception only says that another process has gone."""
    text = str(error).lower()
    return any(words in text for words in _LOST) or any(kind.__name__ in _LOST_TYPES for kind in type(error).__mro__)


def leave(end: End) -> None:
    """Leave this rank's end for the others and the launcher; the first word stands."""
    folder = heartbeat.shared_folder()
    if folder is None or not folder.is_dir() or (folder / f"end-{end.rank}.json").exists():
        return
    temporary = folder / f"end-{end.rank}.tmp"
    with contextlib.suppress(OSError):  # a full disk must not replace the words by its own
        temporary.write_text(json.dumps(asdict(end)))
        os.replace(temporary, folder / f"end-{end.rank}.json")


def left(folder: Path | None) -> list[End]:
    """Every end that ranks left in a launch's folder."""
    return [End(**json.loads(file.read_text())) for file in folder.glob("end-*.json")] if folder else []


def first(ends: Collection[End]) -> End | None:
    """The first cause: the earliest that is more than a lost peer; of ranks that say the same, the lowest one's."""
    causes = [end for end in ends if not end.lost_peer] or list(ends)
    if not causes:
        return None
    earliest = min(causes, key=lambda end: end.time)
    same = [end for end in causes if (end.code, end.message) == (earliest.code, earliest.message)]
    return min(same, key=lambda end: end.rank)


def settle(own: End) -> End:
    """The end whose words stand, after waiting as long as another rank may still have better ones.

    Where it is another rank's, returns once that rank has left: the launcher ends all ranks when one has left.
    """
    leave(own)
    folder = heartbeat.shared_folder()
    waits_for_rank_0 = own.rank != 0 and not own.alone
    while True:
        ends = left(folder)
        chosen = first(ends) or own
        mine = chosen.rank == own.rank
        if mine and not own.lost_peer and not (waits_for_rank_0 and all(end.rank for end in ends)):
            return own
        if not mine and not is_running(chosen.pid):
            return chosen
        if folder is not None and not folder.is_dir():
            return chosen  # the launcher has gone, and nobody listens
        if time.time() > own.time + (SETTLE_SECONDS if mine and own.lost_peer else GRACE_SECONDS):
            return chosen
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there and more than a zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def gone() -> str:
    """The ranks of this machine that are gone without having left an end, in words, "" where there are none."""
    folder = heartbeat.shared_folder()
    said = {end.rank for end in left(folder)}
    lost = (
        [place for place in heartbeat.places(folder) if place.rank not in said and not is_running(place.pid)]
        if folder
        else []
    )
    names = "; ".join(f"{place} (pid {place.pid})" for place in lost)
    return f"{names}: disappeared (killed or crashed); detected by {heartbeat.here()}." if lost else ""
