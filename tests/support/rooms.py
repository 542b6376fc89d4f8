"""The rooms of finetune/ in their order: tests/test_shape.py holds it, scripts/docs/architecture.py prints it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "finetune"

# A file imports from its own room and from rooms before it in this line.
ROOMS = (
    *("errors", "objectives", "report", "recipe", "process", "batching", "data", "launch", "model", "engine"),
    *("memory", "checkpoint", "training", "commands", "train", "__main__"),
)
