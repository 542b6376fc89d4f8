"""One run per output folder: output_dir/.lock, held by flock as long as the process lives.

The kernel releases the lock when the process ends, however it ends: a killed run never leaves its folder locked. The
file holds pid and host for messages; that it exists means nothing. On network filesystems a second machine is kept out
where the filesystem passes flock on (NFS since Linux 2.6.12, Lustre with -o flock); where locks stay on one machine,
runs on two machines do not see each other: there is no heartbeat.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

LOCK_FILE = ".lock"
_HELD: set[int] = set()  # file descriptors of this process's locks


def _drop_in_child() -> None:
    # flock belongs to the open file, which a fork shares: an orphaned data worker would keep a dead run's folder locked
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_drop_in_child)


@dataclass(frozen=True)
class RunLock:
    """A held lock; `held` is false where the filesystem knows no locks."""

    path: Path
    handle: int
    held: bool

    def release(self) -> None:
        """Let the folder go before the process ends; the file stays, empty."""
        if self.handle in _HELD:
            os.ftruncate(self.handle, 0)
            _HELD.discard(self.handle)
            os.close(self.handle)


def acquire(output_dir: Path, say: Callable[[str], None] = print) -> RunLock:
    """Claim `output_dir` (made if missing) for this process.

    Raises UserError while another run holds it, naming pid and host. Where the filesystem refuses locks, `say` gets a
    sentence and the run goes on unprotected.
    """
    path = output_dir / LOCK_FILE
    while True:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            said = f"output_dir: {output_dir} cannot be written ({error.strerror}). Give a folder that can."
            raise UserError(said) from None
        held = _lock(handle, path, say)
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(handle)  # the folder was deleted between open and lock: a lock on that file keeps nobody out
    _HELD.add(handle)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0)
    return RunLock(path, handle, held)


def _lock(handle: int, path: Path, say: Callable[[str], None]) -> bool:
    """Whether the filesystem knows locks. Raises UserError when another run holds this one; `handle` is then closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = _holder(handle)
            os.close(handle)
            raise UserError(
                f"output_dir: {path.parent} is in use by another run ({holder}). Wait until it ends, stop it, or give"
                " another output_dir."
            ) from None
        why = f"this filesystem refuses locks ({error.strerror})"
        say(f"{path}: {why}: nothing keeps a second run out of {path.parent}")
        return False
    return True


def _holder(handle: int) -> str:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
        return f"pid {record['pid']} on host {record['host']}, since {record['since']}"
    except (ValueError, TypeError, KeyError):
        return "it has not written its pid yet"
