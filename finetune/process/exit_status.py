"""How a process of ours ends: one message, one exit status, and a status file for whoever launched us."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

from finetune.errors import FinetuneError
from finetune.process import heartbeat, root_cause
from finetune.process.root_cause import RankExit
from finetune.report import redact

# Environment variables: where the first to fail leaves its exit status and message, and where a launched command leaves
# what its launcher prints.
STATUS_FILE = "FINETUNE_STATUS_FILE"
REPORT_FILE = "FINETUNE_REPORT_FILE"
INTERRUPTED = 130  # Ctrl-C: the shell's own convention, 128 + SIGINT


def run_guarded(body: Callable[[], None]) -> int:
    """Run `body` and return the exit status.

    An expected error prints its message as the last line; any other keeps its traceback.
    """
    heartbeat.own_status()  # the launcher and the other ranks know this process from now on
    try:
        body()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever ends a rank becomes its exit status
        own, stands = resolve(error)
        if stands.rank == own.rank:
            a_bug = not isinstance(error, (FinetuneError, KeyboardInterrupt)) and stands == own
            say(stands, "".join(traceback.format_exception(error)) if a_bug else "")
        return own.code
    write_status(0, "")
    return 0


def resolve(error: BaseException) -> tuple[RankExit, RankExit]:
    """(this rank's end by `error`, the end of the launch: this one, or an earlier one of another rank).

    Every rank meets the same bad input, and the others meet a broken connection when only one rank fails: root_cause.py
    says whose message counts, and waits for it. A second call with the same error does not wait again.
    """
    own = getattr(error, "end", None) or _end_of(error)
    vars(error)["end"] = own
    stands = root_cause.await_root_cause(own)
    if stands == own and own.lost_peer and (lost := root_cause.vanished()):
        stands = replace(own, message=lost)
    return own, stands


def _end_of(error: BaseException) -> RankExit:
    status = heartbeat.own_status()
    code, lost, alone = getattr(error, "exit_code", 1), False, getattr(error, "alone", False)
    if isinstance(error, FinetuneError):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = INTERRUPTED, "interrupted"
    else:
        lost, alone = root_cause.is_lost_peer(error), bool(status.activity)
        first_line = next(iter(str(error).splitlines()), "")
        message = f"{type(error).__name__}: {first_line}" + (f" ({status})" if status.activity else "")
    return RankExit(status.rank, status.pid, time.time(), code, redact.text(message), lost, alone)


def say(end: RankExit, text: str = "") -> None:
    """Print the message of `end` as this process's last line, after `text`, a traceback.

    Under `finetune train` the message is left to the launcher, which prints it at its own end.
    """
    text = redact.text(text)
    if text:
        print(f"\n[rank {end.rank}] {text.strip()}" if end.rank else text.strip(), file=sys.stderr, flush=True)
    write_status(end.code, end.words)
    if heartbeat.SHARED_FOLDER not in os.environ and text.strip().splitlines()[-1:] != [end.words]:
        print(end.words, file=sys.stderr, flush=True)


def write_status(code: int, message: str) -> None:
    """Leave exit status and message in the file that STATUS_FILE names.

    A rank that fails writes its own; success is written by rank 0 alone.
    """
    path = os.environ.get(STATUS_FILE)
    if path and (code or os.environ.get("RANK", "0") == "0"):
        temporary = f"{path}.{os.getpid()}"
        with contextlib.suppress(OSError):
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"exit_code": code, "message": message}, file)
            os.replace(temporary, path)
