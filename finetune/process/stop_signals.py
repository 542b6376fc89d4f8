"""Requests during a run: to stop (a signal, the death of the launcher, a file) or to save (a file).

All ranks act on them at the end of the same accumulation window, because a step adds the requests of all ranks up. A
run saves before it stops.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.process import heartbeat, root_cause
from finetune.process.exit_status import say
from finetune.process.parent_death import signal_on_parent_death
from finetune.process.root_cause import RankExit

STOP_FILE, SAVE_FILE = "STOP", "SAVE"  # in the output folder
# Environment variable: a second place for STOP, for launch scripts that know no recipe.
EXTRA_STOP_FILE = "FINETUNE_STOP_FILE"
LAUNCHER_DIED = signal.SIGUSR1  # what the kernel sends us; schedulers send it too, as an early warning
# One Ctrl-C reaches a rank up to three times: from the terminal, from its launcher, and by the launcher's death.
SECOND_SECONDS = 2.0


def stop_when_launcher_dies() -> None:
    """Stop this process when its launcher dies: `accelerate launch` leaves its trainer behind as an orphan."""
    if not signal_on_parent_death(LAUNCHER_DIED, os.getppid()):
        os.kill(os.getpid(), LAUNCHER_DIED)


@dataclass(frozen=True)
class Requests:
    """What this rank was asked for: to save and end, to save and go on."""

    stop: bool = False
    save: bool = False


@contextmanager
def stop_signals(output_dir: Path) -> Iterator[Callable[[], Requests]]:
    """While active, SIGTERM, SIGINT, SIGUSR1 and a file output_dir/STOP ask for a stop, output_dir/SAVE for a save.

    Yields a function that returns the requests so far. A second SIGTERM or SIGINT, two seconds after the first signal
    or later, ends the process at once. The previous handlers come back at the end, but not where an error ends the run:
    the launcher then signals all ranks, and this one may still have to say why it failed.
    """
    stop_files = [output_dir / STOP_FILE, *(Path(path) for path in [os.environ.get(EXTRA_STOP_FILE)] if path)]
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        asked.append(number)  # and no message: where the terminal has gone, printing fails in the middle of a step

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, LAUNCHER_DIED)}
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    wakeup = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_the_second, args=(heard,), name="second signal", daemon=True).start()
    yield lambda: Requests(bool(asked) or any(file.exists() for file in stop_files), (output_dir / SAVE_FILE).exists())
    signal.set_wakeup_fd(wakeup)
    os.close(tell)
    for number, old in before.items():
        signal.signal(number, old)


def _end_at_the_second(heard: int) -> None:
    """End the process at the second signal. In a thread: a main thread that waits for a rank runs no handler."""
    first = None
    while number := int.from_bytes(os.read(heard, 1), "big"):
        now = time.monotonic()
        first = first or now
        if number in (signal.SIGTERM, signal.SIGINT) and now - first > SECOND_SECONDS:
            mine = heartbeat.own_status()
            message = (
                f"stopped at once by a second {signal.Signals(number).name}. The same command resumes from the newest"
                " checkpoint."
            )
            end = RankExit(mine.rank, mine.pid, time.time(), 128 + number, message)
            root_cause.record(end)
            say(end)
            os._exit(end.code)
    os.close(heard)
