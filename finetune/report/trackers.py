"""Experiment trackers: what goes to metrics.jsonl also goes to TensorBoard, Weights & Biases and others, by
accelerate's own classes.

For people to look at, never what a run depends on: a tracker that fails costs one warning and gets nothing more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

Scalar = bool | int | float | str
FINISH_SECONDS = 30.0


@dataclass
class Trackers:
    """Those that still work; on ranks other than 0 there are none."""

    working: list[GeneralTracker]
    say: Callable[[str], None]

    def log(self, row: Mapping) -> None:
        """The numbers of one row of metrics.jsonl, at its step."""
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self._each(lambda tracker: tracker.log(numbers, step=row["step"]))

    def finish(self) -> None:
        """Let them write what they still hold, for half a minute at most: some wait for a service that does not
        answer.
        """
        names = ", ".join(tracker.name for tracker in self.working)
        thread = threading.Thread(
            target=lambda: self._each(lambda tracker: tracker.finish()), name="trackers", daemon=True
        )
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            self.say(
                f"warning: logging.report_to: {names} did not finish within {FINISH_SECONDS:.0f} s; metrics.jsonl has"
                " everything."
            )

    def _each(self, act: Callable[[GeneralTracker], object]) -> None:
        for tracker in list(self.working):
            try:
                act(tracker)
            except Exception as error:  # noqa: BLE001 - somebody's service: whatever it raises, the run goes on without it
                self.working.remove(tracker)
                self.say(
                    f"warning: logging.report_to: {tracker.name} failed ({type(error).__name__}: {error}) and gets"
                    " nothing more; metrics.jsonl has everything."
                )


def start(
    names: Iterable[str], folder: Path, run: str, settings: Mapping[str, Scalar], say: Callable[[str], None]
) -> Trackers:
    """Start the trackers called `names` for the run named `run`; those that write files do so below `folder`. Rank 0
    only.
    """
    classes = [LOGGER_TYPE_TO_CLASS[name] for name in names]
    trackers = Trackers(
        [made(run, str(folder)) if made.requires_logging_directory else made(run) for made in classes], say
    )
    trackers._each(lambda tracker: tracker.start())
    trackers._each(lambda tracker: tracker.store_init_configuration(dict(settings)))
    return trackers
