"""The wish to stop: a signal to this process, or a file in the output folder. It is granted at the end of a window."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "STOP"


@contextmanager
def stop_wish(output_dir: Path) -> Iterator[Callable[[], bool]]:
    """Within it the first of SIGNALS asks for a stop, and so does a file output_dir/STOP; the second leaves at once.

    Yields what tells whether this rank was asked. The signals are as they were afterwards.
    """
    asked: list[int] = []
    before = {}

    def handler(number: int, frame) -> None:
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.append(number)

    for number in SIGNALS:
        before[number] = signal.signal(number, handler)
    try:
        yield lambda: bool(asked) or (output_dir / STOP_FILE).exists()
    finally:
        for number, old in before.items():
            signal.signal(number, old)
