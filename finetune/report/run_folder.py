"""A run's output folder: its names, run.json and metrics.jsonl (written by rank 0, readable at any moment); nothing is
written through a link that leads out of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.report import redact

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
DEEPSPEED_FILE = "deepspeed.json"
CHECKPOINTS, STATE = "checkpoints", "state.json"  # STATE: in each checkpoint, where the run was
BEFORE = "before-"  # what was there before a run that started over: never written to again


def write_json(path: Path, document: dict) -> None:
    """Replace `path` atomically: a reader sees the old document or the new one, never half of one."""
    _replace(path, json.dumps(document, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict | None:
    """The document, or None where there is no file or not a whole document."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def is_finished(output_dir: Path) -> bool:
    """Whether run.json says that the run in this folder is done."""
    run = read_json(output_dir / RUN_FILE)
    return run is not None and run.get("status") == "done"


@dataclass
class RunFiles:
    """The two files of a run that is going on, and what else gets the metrics. `enabled` is true on rank 0 only."""

    output_dir: Path
    enabled: bool
    document: dict
    also: Callable[[dict], None] = lambda row: None

    def start(
        self, recipe_text: str, window: int = 0, evaluated: Collection[int] = (), deepspeed: dict | None = None
    ) -> None:
        """Claim the folder: resolved recipe, DeepSpeed's configuration if it runs, run.json with status running,
        metrics.jsonl cut to `window` windows and the evaluations at the steps in `evaluated`."""
        if not self.enabled:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        _replace(self.output_dir / "recipe.yaml", recipe_text)
        if deepspeed is not None:
            write_json(self.output_dir / DEEPSPEED_FILE, redact.tree(deepspeed))
        else:
            (self.output_dir / DEEPSPEED_FILE).unlink(missing_ok=True)  # of a run under another engine
        _cut(self.output_dir / METRICS_FILE, window, evaluated)
        self.update(status="running", exit_code=None)

    def log(self, row: dict) -> None:
        """Append one object to metrics.jsonl. Floats round-trip; numbers that are not finite become strings."""
        if self.enabled:
            clean = {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in row.items()}
            with open(self.output_dir / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
            self.also(clean)

    def update(self, **fields: Any) -> None:
        """Merge fields into run.json."""
        if self.enabled:
            self.document |= fields
            write_json(self.output_dir / RUN_FILE, redact.tree(self.document))


def _cut(metrics: Path, window: int, evaluated: Collection[int]) -> None:
    """Keep the rows of windows up to `window` and of evaluations that are known of: what came later is done again."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    kept = []
    for line in lines if window else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if row["window"] <= window if "window" in row else row["step"] in evaluated:
            kept.append(line)
    _replace(metrics, "".join(kept))


def refuse_links_out(output_dir: Path) -> None:
    """Raises UserError naming every symbolic link in `output_dir` and its checkpoints/ that leads out of it.

    `output_dir` itself may be a link, and so may the folders above it.
    """
    home = os.path.realpath(output_dir)
    found: list[str] = []
    for folder in (output_dir, output_dir / CHECKPOINTS):
        if not found and folder.is_dir():
            links = sorted(
                entry.path for entry in os.scandir(folder) if entry.is_symlink() and not entry.name.startswith(BEFORE)
            )
            found += [link for link in links if os.path.commonpath([home, os.path.realpath(link)]) != home]
    if found:
        raise UserError(
            [
                f"output_dir: {link} is a symbolic link to {os.path.realpath(link)}, outside of {output_dir}, and a run"
                " writes nothing there. Remove the link, or set output_dir to a folder on that disk (output_dir itself"
                " may be a link)."
                for link in found
            ]
        )
