"""Where a run is between two windows, and the file state.json that keeps it in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finetune.batching.noise_scale import NoiseState
from finetune.batching.windows import Position
from finetune.report.run_folder import STATE


@dataclass(frozen=True)
class Progress:
    """What is known of a run between two windows. `evaluations` are (step, loss) pairs, `seconds` over all its
    processes.
    """

    position: Position = Position()
    total_tokens: int = 0
    train_loss: float | None = None
    evaluations: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    recent_losses: tuple[float, ...] = ()  # of applied windows, for training/loss_spike.py

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss."""
        return min(self.evaluations, key=lambda pair: pair[1])[0] if self.evaluations else None


def read_progress(folder: Path) -> Progress:
    """The progress in a checkpoint folder."""
    document = json.loads((folder / STATE).read_text())
    position = document.pop("position")
    noise = NoiseState(**position.pop("noise"))
    evaluations = tuple((step, loss) for step, loss in document.pop("evaluations"))
    recent = tuple(document.pop("recent_losses"))
    return Progress(Position(**position, noise=noise), evaluations=evaluations, recent_losses=recent, **document)
