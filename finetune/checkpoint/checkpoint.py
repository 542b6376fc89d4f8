"""Checkpoints of a run: position and progress beside the engine's state, published whole, verified before they are
used.

The position says everything that the next window and its learning rate depend on; the order of rows and all randomness
are functions of it and the seed. What must be the same at a resume are the facts in the manifest:
identity.py compares them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from finetune.checkpoint import snapshots
from finetune.checkpoint.progress import Progress, read_progress
from finetune.checkpoint.snapshots import Snapshot
from finetune.engine.deepspeed.checkpoint import BYTES_FACTOR
from finetune.engine.engine import Engine
from finetune.engine.kinds import convert_state
from finetune.errors import UserError
from finetune.report.run_folder import STATE

PATIENCE_SECONDS = 60


def save(
    engine: Engine, root: Path, progress: Progress, facts: dict, limit: int, keep_best: bool, bytes_needed: float
) -> str:
    """Save and publish a checkpoint, then prune; "" when it is there, else why not, on every rank. A collective."""
    step = progress.position.step
    problem = engine.on_rank_0(lambda: _begin(root, step, bytes_needed))
    if problem:
        return problem
    folder = snapshots.folder_of(root, step, snapshots.PARTIAL)
    digests: dict[str, snapshots.Digest] = {}
    try:
        names = engine.save_state(folder)
        if engine.rank == 0:
            snapshots.write_synced(folder / STATE, json.dumps(dataclasses.asdict(progress)).encode())
            names = [STATE, *names]
        digests = snapshots.digest(folder, names)
    except OSError as error:
        problem = f"rank {engine.rank} on {engine.host}: {error}"
    said = engine.gather_objects((f"rank {engine.rank} on {engine.host}", problem, digests))
    problem = next((text for _, text, _ in said if text), "")
    if problem:
        if engine.rank == 0:
            snapshots.discard(root, step)
        return problem

    def publish() -> None:
        snapshots.publish(root, step, facts, {name: found for name, _, found in said})
        with contextlib.suppress(OSError):  # the new one is there; the next save tries again
            snapshots.prune(root, step, limit, progress.best_step if keep_best else None)

    return engine.on_rank_0(publish)


def _begin(root: Path, step: int, bytes_needed: float) -> None:
    snapshots.start(root, step)  # first: it removes what a killed save left
    if shortage := snapshots.check_space(root, bytes_needed):
        snapshots.discard(root, step)
        raise OSError(shortage)


def choose(engine: Engine, root: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint that verifies, the same on every rank; damaged ones are named. A collective."""
    found = snapshots.newest(root, say) if engine.rank == 0 and root.exists() else None
    return engine.broadcast_object(found)


def load(engine: Engine, snapshot: Snapshot) -> Progress:
    """Bring the engine to the state of a verified checkpoint; where the run is then. A collective.

    DeepSpeed's shards of another number of ranks are converted first. Raises UserError where a machine does not see the
    folder, or the conversion finds no room."""
    _all_see(engine, snapshot.folder, "Put output_dir on a shared disk, or copy the folder there.")
    if engine.strategy.engine == "deepspeed" and snapshot.facts["ranks"] != engine.ranks:
        _load_converted(engine, snapshot)
    else:
        engine.load_state(snapshot.folder)
    return read_progress(snapshot.folder)


def _load_converted(engine: Engine, snapshot: Snapshot) -> None:
    root, then = snapshot.folder.parent, snapshot.facts["ranks"]
    folder = snapshots.folder_of(root, snapshot.step, snapshots.PARTIAL)

    def make() -> None:
        needed_bytes = BYTES_FACTOR * sum(file.bytes for file in snapshot.files.values())
        scratch = snapshots.scratch(root, snapshot.step)
        if shortage := snapshots.check_space(root, needed_bytes, "the conversion"):
            raise OSError(shortage)
        convert_state(snapshot.folder, scratch)

    try:
        if problem := engine.on_rank_0(make):
            raise UserError(
                f"{snapshot.folder} was written on {then} ranks and could not be converted for {engine.ranks}:"
                f" {problem}. If the disk is full, make room; else go on with {then} ranks."
            )
        _all_see(engine, folder, f"Put output_dir on a shared disk, or go on with {then} ranks.", PATIENCE_SECONDS)
        engine.load_state(folder)
        engine.barrier()  # nobody reads any more
    finally:
        if engine.rank == 0:
            snapshots.discard(root, snapshot.step)


def _all_see(engine: Engine, folder: Path, advice: str, patience_seconds: float = 0) -> None:
    """Raises UserError on every rank where one of them does not see the folder. A collective."""
    deadline = time.monotonic() + patience_seconds
    while not folder.exists() and time.monotonic() < deadline:  # names on network disks come late
        time.sleep(0.5)
    seen = engine.gather_objects((engine.host, folder.exists()))
    if blind := sorted({host for host, there in seen if not there}):
        raise UserError(f"{folder} is not visible on {', '.join(blind)}. {advice}")
