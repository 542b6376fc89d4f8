"""How the ranks of a launch ended, and which of them failed first: its message is the one that is printed.

Before anything else, a failing rank writes how it ended to a folder that the ranks of one machine share (heartbeat.py):
others fail because of it, soon, and often with longer messages.
"""

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

GRACE_SECONDS = 10.0  # for rank 0, which speaks where all ranks met the same error, and for the first rank to speak
SETTLE_SECONDS = 2.0  # after a connection broke: for the peer's own message, or for its process to be gone
# What gloo, NCCL and torch's store say where another process has gone or never came: a consequence, not a cause.
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
# torch.distributed's exceptions, by name: nothing here imports torch
_LOST_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")


@dataclass(frozen=True)
class RankExit:
    """How one rank ended: when (Unix seconds), with which exit status and message."""

    rank: int
    pid: int
    time: float
    code: int
    message: str
    lost_peer: bool = False  # it only noticed that another rank had gone
    alone: bool = False  # this rank's own error, which the others do not meet themselves

    @property
    def words(self) -> str:
        """The message, with the rank in front unless it is rank 0 or the message names it."""
        if self.rank == 0 or f"rank {self.rank}" in self.message:
            return self.message
        return f"[rank {self.rank}] {self.message}"


def is_lost_peer(error: BaseException) -> bool:
    """Whether this exception only says that another process has gone."""
    text = str(error).lower()
    return any(words in text for words in _LOST) or any(kind.__name__ in _LOST_TYPES for kind in type(error).__mro__)


def record(end: RankExit) -> None:
    """Write how this rank ended, for the other ranks and the launcher; a second call changes nothing."""
    folder = heartbeat.shared_folder()
    if folder is None or not folder.is_dir() or (folder / f"end-{end.rank}.json").exists():
        return
    temporary = folder / f"end-{end.rank}.tmp"
    with contextlib.suppress(OSError):  # a full disk must not replace the message by its own
        temporary.write_text(json.dumps(asdict(end)))
        os.replace(temporary, folder / f"end-{end.rank}.json")


def recorded(folder: Path | None) -> list[RankExit]:
    """Every end that ranks wrote to a launch's folder; none without a folder."""
    return [RankExit(**json.loads(file.read_text())) for file in folder.glob("end-*.json")] if folder else []


def root_cause(ends: Collection[RankExit]) -> RankExit | None:
    """The root cause: the earliest end that is more than a lost peer; of equal ones the lowest rank's."""
    causes = [end for end in ends if not end.lost_peer] or list(ends)
    if not causes:
        return None
    earliest = min(causes, key=lambda end: end.time)
    same = [end for end in causes if (end.code, end.message) == (earliest.code, earliest.message)]
    return min(same, key=lambda end: end.rank)


def await_root_cause(own: RankExit) -> RankExit:
    """The end whose message is printed, after waiting as long as another rank may still write a better one.

    Where it is another rank's, returns once that rank has ended: the launcher ends all ranks when one has ended.
    """
    record(own)
    folder = heartbeat.shared_folder()
    waits_for_rank_0 = own.rank != 0 and not own.alone
    while True:
        ends = recorded(folder)
        chosen = root_cause(ends) or own
        mine = chosen.rank == own.rank
        if mine and not own.lost_peer and not (waits_for_rank_0 and all(end.rank for end in ends)):
            return own
        if not mine and not is_running(chosen.pid):
            return chosen
        if folder is not None and not folder.is_dir():
            return chosen  # the launcher has gone
        if time.time() > own.time + (SETTLE_SECONDS if mine and own.lost_peer else GRACE_SECONDS):
            return chosen
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process of this machine exists and is no zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def vanished() -> str:
    """The ranks of this machine that disappeared and wrote no end, as a sentence; empty where there are none."""
    folder = heartbeat.shared_folder()
    if folder is None:
        return ""
    said = {end.rank for end in recorded(folder)}
    lost = [
        status for status in heartbeat.rank_statuses(folder) if status.rank not in said and not is_running(status.pid)
    ]
    names = "; ".join(f"{status} (pid {status.pid})" for status in lost)
    return f"{names}: disappeared (killed or crashed); detected by {heartbeat.own_status()}." if lost else ""
