"""Ends a run that stands still: a thread per rank that expects a new place (whereabouts.py) every so many seconds.

A rank that hangs keeps all others waiting in a collective, for ever or for the process group's half hour. The one that stands outside a
collective reports first; one that stands inside may only be waiting, and reports later, naming the rank that is behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from finetune import ends, whereabouts
from finetune.ends import End
from finetune.exits import say

# Where a thread stands while it waits for other ranks, or for a device that does: the innermost frames' files.
_WAITING = ("/torch/distributed/", "/torch/autograd/", "/deepspeed/comm/", "/deepspeed/runtime/", "/accelerate/utils/operations.py",
            "/finetune/backend/engine.py")  # fmt: skip


def longer(seconds: float) -> float:
    """How long a rank may stand still that waits for others, where `seconds` is the limit."""
    return seconds + min(60.0, max(5.0, seconds / 4))


@contextlib.contextmanager
def watching(seconds: float, leave_word: Callable[[int, str], None]) -> Iterator[None]:
    """Within it the process ends with status 1 when its main thread stays in one place for `seconds` (0: never).

    `leave_word` is called with status and message before; whereabouts.at is what counts as progress.
    """
    over = threading.Event()
    if seconds:
        main = threading.get_ident()
        threading.Thread(target=_watch, args=(seconds, main, leave_word, over), name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(seconds: float, main: int, leave_word: Callable[[int, str], None], over: threading.Event) -> None:
    tick = min(1.0, seconds / 10)
    beat, still, looked = -1, 0.0, time.monotonic()
    while not over.wait(tick):
        now = time.monotonic()
        # a process that was stopped for a while (a suspended job) has not been standing still
        still, looked = still + min(now - looked, 2 * tick), now
        if whereabouts.here().beat != beat:
            beat, still = whereabouts.here().beat, 0.0
        if still > ends.GRACE_SECONDS and (cause := ends.first(ends.left(whereabouts.shared_folder()))) and not cause.lost_peer:
            os._exit(cause.code)  # another rank failed and said so: this one waits for it in vain
        if still < seconds:
            continue
        stack = traceback.extract_stack(sys._current_frames()[main])
        waits = any(part in frame.filename.replace("\\", "/") for frame in stack[-2:] for part in _WAITING)
        if still >= (longer(seconds) if waits else seconds):
            _end(seconds, stack, waits, leave_word)


def _end(seconds: float, stack: traceback.StackSummary, waits: bool, leave_word: Callable[[int, str], None]) -> None:
    """Say where this rank, or the one that it waits for, stands, and leave. Does not return."""
    place, frame = whereabouts.here(), stack[-1]
    rest = f"training.step_timeout_seconds is {seconds:g}: set it higher if this can take so long"
    stands = f"it stands in {os.path.basename(frame.filename)}:{frame.lineno} ({frame.name})"
    behind = [other for other in whereabouts.others() if other.words and other.beat < place.beat]
    if waits and behind:
        late = min(behind, key=lambda other: other.beat)
        message = f"{late}: no progress for {time.time() - late.time:.0f} s, seen from rank {place.rank}, which waits for it. {rest}."
    else:
        what = ", perhaps waiting for another rank" if waits and place.ranks > 1 else ""
        message = f"{place}: no progress for {time.time() - place.time:.0f} s; {stands}{what}. {rest}."
    own = End(place.rank, place.pid, time.time(), 1, message, alone=True)
    ends.leave(own)
    for other in behind if waits else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other.pid, signal.SIGKILL)  # it does not run its own watchdog any more, nor would it hear a SIGTERM
    try:
        if ends.settle(own) == own:
            leave_word(own.code, own.words)
            say(own, f"the main thread stands here:\n{''.join(stack.format())}")
    finally:
        os._exit(1)
