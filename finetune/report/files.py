"""metrics.jsonl and run.json: written by rank 0, readable at any moment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"


def write_json(path: Path, document: dict) -> None:
    """Replace `path` atomically: a reader sees the old document or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict | None:
    """The document, or None where there is no file or not a whole document."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def folder_state(output_dir: Path) -> str:
    """`free`, `finished` (run.json says done) or `holds a run` (steps were logged or a model lies there)."""
    run = read_json(output_dir / RUN_FILE)
    if run is not None and run.get("status") == "done":
        return "finished"
    metrics = output_dir / METRICS_FILE
    if (metrics.exists() and metrics.stat().st_size > 0) or (output_dir / "model").exists():
        return "holds a run"
    return "free"


@dataclass
class RunFiles:
    """The two files of a run that is going on. `enabled` is true on rank 0 only."""

    output_dir: Path
    enabled: bool
    document: dict

    def start(self, recipe_text: str) -> None:
        """Claim the folder: resolved recipe, run.json with status running, an empty metrics.jsonl."""
        if not self.enabled:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        (self.output_dir / METRICS_FILE).write_text("", encoding="utf-8")
        self.update(status="running", exit_code=None)

    def log(self, row: dict) -> None:
        """Append one object to metrics.jsonl. Floats round-trip; numbers that are not finite become strings."""
        if self.enabled:
            clean = {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in row.items()}
            with open(self.output_dir / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")

    def update(self, **fields) -> None:
        """Merge fields into run.json."""
        if self.enabled:
            self.document |= fields
            write_json(self.output_dir / RUN_FILE, self.document)
