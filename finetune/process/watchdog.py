"""Ends a run that makes no progress: a thread per rank that expects a new heartbeat every so many seconds.

A rank that hangs keeps all others waiting in a collective, for ever or for the process group's half hour. A rank that
is stuck outside a collective reports first; one inside may only be waiting, and reports later, naming the rank that is
behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from finetune.process import heartbeat, root_cause
from finetune.process.exit_status import say
from finetune.process.heartbeat import RankStatus
from finetune.process.root_cause import RankExit

# The files of the innermost frames of a thread that waits for other ranks, or for a device that does.
_WAITING = (
    "/torch/distributed/",
    "/torch/autograd/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/",
    "/accelerate/utils/operations.py",
    "/finetune/engine/engine.py",
    "/finetune/engine/native.py",
    "/finetune/engine/deepspeed/",
)

SLOW_FACTOR = 10  # for saves and the export of a large model, during which there is no heartbeat


def longer(seconds: float) -> float:
    """How long a rank that waits for others may make no progress, where `seconds` is the limit."""
    return seconds + min(60.0, max(5.0, seconds / 4))


def ranks_wait(seconds: float) -> float:
    """The process group's timeout for collectives, where `seconds` is the watchdog's limit (0: a year).

    It is longer than the longest the watchdog waits: the watchdog knows what is wrong.
    """
    return longer(longer(SLOW_FACTOR * seconds)) if seconds else 365 * 86400.0


@contextlib.contextmanager
def watching(seconds: float, leave_word: Callable[[int, str], None]) -> Iterator[None]:
    """While active, exits with status 1 if the main thread makes no progress for `seconds` (0: never).

    Progress is a new heartbeat. `leave_word` is called with status and message before the exit.
    """
    over = threading.Event()
    arguments = (seconds, threading.get_ident(), leave_word, over)
    threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(seconds: float, main: int, leave_word: Callable[[int, str], None], over: threading.Event) -> None:
    tick = min(1.0, (seconds or math.inf) / 10)
    count, still, looked = -1, 0.0, time.monotonic()
    while not over.wait(tick):
        heartbeat.alive()
        now = time.monotonic()
        # a process that was stopped for a while (a suspended job) has not been standing still
        still, looked = still + min(now - looked, 2 * tick), now
        if heartbeat.own_status().count != count:
            count, still = heartbeat.own_status().count, 0.0
        if still > root_cause.GRACE_SECONDS:
            _leave_if_in_vain(leave_word)
        limit = (seconds or math.inf) * (SLOW_FACTOR if heartbeat.own_status().slow else 1)
        if still < limit:
            continue
        stack = traceback.extract_stack(sys._current_frames()[main])
        waits = any(part in frame.filename for frame in stack[-2:] for part in _WAITING)
        others = heartbeat.other_statuses()
        if not waits or (still > longer(limit) and all(time.time() - other.time > limit for other in others)):
            _end(limit, stack, others if waits else [], leave_word)


def _leave_if_in_vain(leave_word: Callable[[int, str], None]) -> None:
    """End this process where another rank has ended.

    On a GPU nothing wakes a rank that waits for another one, not even a SIGTERM.
    """
    cause = root_cause.root_cause(root_cause.recorded(heartbeat.shared_folder()))
    if cause is not None and not cause.lost_peer:
        try:
            leave_word(cause.code, cause.words)
        finally:
            os._exit(cause.code)  # without a message: the other rank has printed it
    if lost := root_cause.vanished():
        _say_and_leave(lost, "", leave_word, lost_peer=True)


def _end(
    limit: float, stack: traceback.StackSummary, others: list[RankStatus], leave_word: Callable[[int, str], None]
) -> None:
    """Print where this rank is stuck, or which of the `others` it waits for, and exit. Does not return."""
    status, frame, now = heartbeat.own_status(), stack[-1], time.time()
    dead = [other for other in others if now - other.alive > limit / 2]
    late = dead or [other for other in others if other.count < status.count]
    message = (
        f"{status}: no progress for {now - status.time:.0f} s; stuck in {frame.name}"
        f" ({os.path.basename(frame.filename)}:{frame.lineno})"
    )
    if late:
        message = f"{late[0]}: no progress for {now - late[0].time:.0f} s; rank {status.rank} waits for it"
    elif others:
        message += ", perhaps waiting for another rank"
    for other in dead:  # its own watchdog does not run any more, and a SIGTERM does not reach it
        with contextlib.suppress(OSError):
            os.kill(other.pid, signal.SIGKILL)
    rest = f"training.step_timeout_seconds allows {limit:g} s for this: raise it if this can take longer."
    _say_and_leave(f"{message}. {rest}", f"the main thread is here:\n{''.join(stack.format())}", leave_word)


def _say_and_leave(message: str, text: str, leave_word: Callable[[int, str], None], lost_peer: bool = False) -> None:
    status = heartbeat.own_status()
    own = RankExit(status.rank, status.pid, time.time(), 1, message, lost_peer, alone=True)
    try:
        stands = root_cause.await_root_cause(own)
        leave_word(stands.code, stands.words)
        if stands == own:
            say(own, text)
    finally:
        os._exit(1)
