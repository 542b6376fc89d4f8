"""What a person sees while a run goes on and at its end. Everything goes to stderr, from rank 0 only."""

from __future__ import annotations

import contextlib
import sys

from tqdm import tqdm

from finetune.report import redact
from finetune.report.text import human_bytes


class Console:
    """Lines, a progress bar in optimizer steps, and the summary. Silent where `enabled` is false (ranks other than
    0).
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.bar: tqdm | None = None

    def say(self, text: str) -> None:
        """One line (or block), without tearing the progress bar."""
        if self.enabled:
            with contextlib.suppress(OSError):  # the terminal may have gone; the run goes on
                tqdm.write(redact.text(text), file=sys.stderr)
                sys.stderr.flush()

    def facts(self, rows: dict[str, str]) -> None:
        """Aligned `name  value` lines."""
        width = max(map(len, rows))
        self.say("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))

    def start_bar(self, steps: int, done: int = 0) -> None:
        """Begin the progress bar of `steps` optimizer steps, `done` of them before. In a log file it refreshes every
        half minute at most.
        """
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            disable=not self.enabled,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
            file=sys.stderr,
            desc="train",
        )

    def advance(self, step: int, loss: float, learning_rate: float, tokens_per_second: float, peak_bytes: int) -> None:
        """Move the bar to `step` and show the figures people watch."""
        if self.bar is None:
            return
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s, peak"
            f" {human_bytes(peak_bytes)}",
            refresh=False,
        )
        with contextlib.suppress(OSError):
            self.bar.update(step - self.bar.n)

    def end_bar(self) -> None:
        """Close the progress bar, if one is open."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
            self.bar = None
