"""The wish to stop: a signal to this process, the death of its launcher, or a file in the output folder.

It is granted at the end of a window, on all ranks the same one (loop.py adds the wishes of all ranks up), after saving.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STOP_FILE = "STOP"
LAUNCHER_DIED = signal.SIGUSR1  # what the kernel sends us; schedulers send it too, as an early warning
PR_SET_PDEATHSIG = 1
SECOND_SECONDS = 2.0  # one Ctrl-C reaches a rank up to three times: by the terminal, its launcher, and the launcher's death


def follow_launcher() -> None:
    """Let the kernel tell this process when its launcher dies: `accelerate launch` leaves its trainer behind as an orphan."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(LAUNCHER_DIED))
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), LAUNCHER_DIED)


@contextmanager
def stop_wish(output_dir: Path) -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM, SIGINT and SIGUSR1 ask for a stop, and so does a file output_dir/STOP.

    A second SIGTERM or SIGINT, two seconds after the first signal or later, ends the process at once. Yields what tells whether this
    rank was asked. The signals are as they were afterwards.
    """
    asked: list[float] = []

    def handler(number: int, frame: object) -> None:
        now = time.monotonic()
        if asked and number != LAUNCHER_DIED and now - asked[0] > SECOND_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.append(now)  # and nothing else: where the terminal has gone, a word would be an error in the middle of a step

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT, LAUNCHER_DIED)}
    try:
        yield lambda: bool(asked) or (output_dir / STOP_FILE).exists()
    finally:
        for number, old in before.items():
            signal.signal(number, old)
