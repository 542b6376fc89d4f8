"""What lies in a run's folder, whether it is whole, and what a resume would take. Torch-free."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from finetune.checkpoint import snapshots
from finetune.checkpoint.manifest import MANIFEST, Snapshot, changed, examine, some
from finetune.checkpoint.progress import read_progress
from finetune.errors import UserError
from finetune.report.run_folder import CHECKPOINTS, STATE

NEWEST = "newest"


def survey(run: Path, hashes: bool) -> dict:
    """The document of `finetune checkpoints --json`: docs/resume.md says what its keys hold. Raises UserError: no run
    there.
    """
    root = root_of(run)
    evaluations = _logged(run / "metrics.jsonl")
    found = [examine(folder, hashes) for folder in snapshots.candidates(root)]
    # a run that goes on may have pruned one meanwhile
    entries = [_entry(snapshot, evaluations) for snapshot in found if not snapshot.problems or snapshot.folder.exists()]
    whole = [entry["step"] for entry in entries if not entry["problems"]]
    return {
        "run": str(run),
        "checked": "hashes" if hashes else "lengths",
        "latest": _latest(root),
        "resume_from": max(whole, default=None),
        "checkpoints": entries,
    }


def root_of(run: Path) -> Path:
    """The folder of a run's checkpoints. Raises UserError where `run` is no output folder."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder. Give a run's output_dir, such as runs/x.")
    if not any((run / name).exists() for name in (CHECKPOINTS, "run.json", "recipe.yaml")):
        hint = next((f"Did you mean {p}?" for p in (run.parent, run.parent.parent) if (p / CHECKPOINTS).is_dir()), "")
        raise UserError(
            f"{run}: is no run's output folder: it holds neither {CHECKPOINTS}/ nor run.json. {hint}".rstrip()
        )
    return run / CHECKPOINTS


def pick(run: Path, step: str) -> Snapshot:
    """The checkpoint of this step (or the `newest`) with every hash compared. Raises UserError: none, or damaged."""
    root = root_of(run)
    folders = {examine(folder, hashes=False).step: folder for folder in snapshots.candidates(root)}
    if not folders:
        raise UserError(f"{root}: there is no checkpoint.")
    if step != NEWEST and not (step.isdigit() and int(step) in folders):
        raise UserError(
            f"--export: there is no checkpoint of step {step} in {root}. Give one of {some(map(str, folders))}, or"
            f" {NEWEST}."
        )
    folder = folders[max(folders) if step == NEWEST else int(step)]
    found = examine(folder, hashes=True)
    if found.problems:
        raise UserError(f"{folder} is damaged and not exported: {some(found.problems, '; ')}")
    return found


def _entry(snapshot: Snapshot, evaluations: dict[int, float | None]) -> dict:
    """One checkpoint; a figure that is not known, or not to be trusted, is None."""
    state, problem = ({}, "") if snapshot.problems else _state(snapshot)
    facts, same = snapshot.facts, snapshot.facts.get("same", {})
    manifest = snapshot.folder / MANIFEST
    saved_time = manifest.lstat().st_mtime if manifest.is_file() else None
    sizes = [digest.bytes for digest in snapshot.files.values()]
    return {
        "step": snapshot.step,
        "name": snapshot.folder.name,
        "window": state.get("window"),
        "epoch": state.get("epoch"),
        "rows": state.get("rows"),
        "total_tokens": state.get("total_tokens"),
        "train_loss": state.get("train_loss"),
        "eval_loss": state.get("evaluations", {}).get(snapshot.step, evaluations.get(snapshot.step)) if state else None,
        "bytes": sum(sizes) if sizes else None,
        "saved_time": saved_time,
        "age_seconds": None if saved_time is None else max(0.0, time.time() - saved_time),
        "engine": same.get("engine"),
        "zero_stage": same.get("ZeRO stage"),
        "mixed_precision": same.get("mixed precision"),
        "ranks": facts.get("ranks"),
        "problems": [*snapshot.problems, *filter(None, [problem])],
    }


def _state(snapshot: Snapshot) -> tuple[dict, str]:
    """(position and progress, what is wrong). A small file: its hash is compared even where those of the weights are
    not.
    """
    expected = snapshot.files.get(STATE)
    problem = f"{STATE} is missing" if expected is None else changed(snapshot.folder, STATE, expected)
    if problem:
        return {}, problem
    try:
        progress = read_progress(snapshot.folder)
    except (ValueError, TypeError, KeyError):
        return {}, f"{STATE} is no state of a run"
    return {
        "window": progress.position.window,
        "epoch": progress.position.epoch,
        "rows": progress.position.applied_rows,
        "total_tokens": progress.total_tokens,
        "train_loss": _finite(progress.train_loss),
        "evaluations": {step: _finite(loss) for step, loss in progress.evaluations},
    }, ""


def _finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return None if value is None or not math.isfinite(value) else float(value)


def _logged(metrics: Path) -> dict[int, float | None]:
    """Held-out losses by step in metrics.jsonl: the last step is evaluated after it was saved."""
    found: dict[int, float | None] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            row = json.loads(line)
            found[int(row["step"])] = _finite(row["eval_loss"])
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _latest(root: Path) -> str | None:
    """What the file `latest` names, a hint for people."""
    path = root / snapshots.LATEST
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
