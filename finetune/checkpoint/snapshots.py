"""Checkpoint folders on disk: published whole or not at all, verified before use, pruned last. Knows nothing of torch.

    checkpoints/step-N/      files of all ranks, manifest.json (bytes and sha256 of each, facts given by the caller)
    checkpoints/latest       the name of the newest folder: a hint for people; what counts is what verifies
    checkpoints/step-N.tmp   being written, or made of step-N at a resume; left by a killed run, removed by the next
    `begin` checkpoints/step-N.old   being replaced or removed; `checkpoints/step-N.aside` was found damaged at a resume

One save: `start` (rank 0) -> every rank writes into the folder and hashes its files with `digest` -> `publish` (rank 0,
with the digests of all ranks) -> `prune` (rank 0). After an OSError anywhere in it: `discard`; nothing older was
touched.

Promised: whatever the moment of a kill or a power cut, `newest` gives the checkpoint before or the new one, bit for bit
as they were written. Files and folders are fsynced before the rename that publishes them, the rename before anything
older goes. Not promised: disks that confirm an fsync without writing; the ranks' files being a consistent state (that
is the caller's); damage on purpose (a manifest can be forged; loading pickles from strangers stays dangerous); changes
after the verification."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.checkpoint.manifest import (
    MANIFEST,
    NAME,
    THREADS,
    Digest,
    Snapshot,
    digest,
    examine,
    is_plain,
    some,
    sync_folder,
    verify,
    walk,
    write_manifest,
    write_synced,
)
from finetune.errors import UserError

__all__ = [
    "Digest",
    "Snapshot",
    "digest",
    "verify",
]  # of manifest.py, beside what is defined here: one import for callers

LATEST = "latest"
PARTIAL, OLD, ASIDE = ".tmp", ".old", ".aside"


def folder_of(root: Path, step: int, suffix: str = "") -> Path:
    """root/step-N; with the suffix PARTIAL the folder that every rank writes into."""
    return root / f"step-{step}{suffix}"


# ---- saving


def check_space(root: Path, needed_bytes: float, what: str = "a checkpoint") -> str | None:
    """Why a save (or `what`) of `needed_bytes` cannot succeed on the disk of `root`, in words, or None. Quotas are not
    seen.
    """
    place = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes >= needed_bytes:
        return None
    return f"{root}: {what} needs {needed_bytes / 2**30:.3g} GiB, {free_bytes / 2**30:.3g} GiB are free"


def start(root: Path, step: int) -> Path:
    """Clear what killed saves left behind and return the new, empty folder for this step. Rank 0 only. Raises
    OSError.
    """
    missing = [p for p in (root, *root.parents) if not p.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)
    for number, path in _entries(root, PARTIAL, OLD):
        if path.name.endswith(OLD) and (path / MANIFEST).exists() and not folder_of(root, number).exists():
            os.rename(path, folder_of(root, number))  # killed between the two renames of a replacement
        else:
            _remove(path)
    folder = folder_of(root, step, PARTIAL)
    os.mkdir(folder)
    return folder


def publish(
    root: Path,
    step: int,
    facts: Mapping,
    digests_by_rank: Mapping[str, Mapping[str, Digest]],
    patience_seconds: float = 60,
) -> Path:
    """Publish what the ranks wrote into step-N.tmp as step-N. Rank 0 only, once every rank has its digests.

    `facts` is what a resume must know (JSON); `digests_by_rank` maps a name such as "rank 3 on node7" to that rank's
    files. An existing step-N that verifies and has the same facts stays; any other one is moved away once the new one
    is complete. File attributes on network disks come late: a file of another rank may take `patience_seconds` to
    appear. Raises UserError when rank 0 cannot see the files of other ranks, ValueError for files that no rank vouches
    for, OSError; the unfinished folder is then gone."""
    folder, target = folder_of(root, step, PARTIAL), folder_of(root, step)
    try:
        files = _agreed(folder, digests_by_rank, patience_seconds)
        write_manifest(folder, step, dict(facts), files)
        for parent, _, _ in os.walk(folder):
            sync_folder(Path(parent))
        # before the publication: later it must not fail
        write_synced(root / (LATEST + PARTIAL), f"{target.name}\n".encode())
        if os.path.lexists(target) and _same_facts(target, facts):
            _remove(folder)
        else:
            if os.path.lexists(target):
                os.rename(target, folder_of(root, step, OLD))
            os.rename(folder, target)
            sync_folder(root)
    except BaseException:
        discard(root, step)
        raise
    os.replace(root / (LATEST + PARTIAL), root / LATEST)
    sync_folder(root)
    return target


def scratch(root: Path, step: int) -> Path:
    """A new, empty folder beside the checkpoints for what is made of step `step`; gone with `discard`. Rank 0 only.
    Raises OSError.

    It is called like an unfinished save, so that after a kill the next save removes it.
    """
    folder = folder_of(root, step, PARTIAL)
    _remove(folder)
    os.mkdir(folder)
    return folder


def discard(root: Path, step: int) -> None:
    """Give up a save: remove its unfinished folder as far as possible. Never raises."""
    shutil.rmtree(folder_of(root, step, PARTIAL), ignore_errors=True)


def prune(root: Path, current: int, limit: int, protect: int | None = None) -> list[Path]:
    """Remove older checkpoints after step `current` was sealed; returns what was removed. Rank 0 only. Raises OSError.

    Kept are `current`, the next older ones up to `limit` in all, and `protect` (the best) beside them. Folders that
    lack files or bytes do not count. Steps above `current` are left alone: see `retire`. Nothing goes unless
    `current` looks whole."""
    assert limit >= 1
    if verify(folder_of(root, current), hashes=False):
        return []
    older = {step: path for step, path in _entries(root, "") if step < current}
    whole = [step for step in sorted(older, reverse=True) if step != protect and not verify(older[step], hashes=False)]
    gone = [path for step, path in sorted(older.items()) if step not in {protect, *whole[: limit - 1]}]
    for _, path in _entries(root, OLD, ASIDE):
        _remove(path)
    for path in gone:
        old = path.with_name(path.name + OLD)
        os.rename(path, old)
        sync_folder(root)
        _remove(old)
    return gone


# ---- choosing


def candidates(root: Path) -> list[Path]:
    """The folders that `newest` looks at, by step."""
    # .old: killed between the two renames of a replacement
    found = dict(_entries(root, OLD)) | dict(_entries(root, ""))
    return [folder for _, folder in sorted(found.items())]


def newest(root: Path, say: Callable[[str], None], threads: int = THREADS) -> Snapshot | None:
    """The checkpoint of the highest step that verifies, or None. `say` gets one message for each damaged one above
    it.
    """
    for folder in reversed(candidates(root)):
        snapshot = examine(folder, hashes=True, threads=threads)
        if not snapshot.problems:
            return snapshot
        if not folder.name.endswith(OLD):
            say(f"{folder} is damaged and not used: {some(snapshot.problems, '; ')}")
    return None


def retire(root: Path, above: int) -> list[Path]:
    """Before training goes on from step `above` (-1: from scratch): later folders no longer count, `prune` removes
    them.

    Returns the folders as they are called now. Raises OSError.
    """
    later = [path for step, path in _entries(root, "", OLD) if step > above]
    for path in later:
        _remove(_aside(path))
        os.rename(path, _aside(path))
    if later:
        sync_folder(root)
    return [_aside(path) for path in later]


def listing(root: Path) -> list[Snapshot]:
    """Every published checkpoint, by step; manifests and lengths are checked, contents are not read."""
    return [examine(folder, hashes=False) for _, folder in sorted(_entries(root, ""))]


def _same_facts(folder: Path, facts: Mapping) -> bool:
    there = examine(folder, hashes=True)
    return not there.problems and there.facts == json.loads(json.dumps(dict(facts)))


def _agreed(
    folder: Path, digests_by_rank: Mapping[str, Mapping[str, Digest]], patience_seconds: float
) -> dict[str, Digest]:
    """All ranks' files as one mapping, each seen here with its length."""
    deadline = time.monotonic() + patience_seconds
    while True:
        found, odd = walk(folder)
        unseen = {
            rank: [n for n, d in files.items() if found.get(n) != d.bytes] for rank, files in digests_by_rank.items()
        }
        unseen = {rank: names for rank, names in unseen.items() if names}
        if not unseen:
            break
        if time.monotonic() >= deadline:
            where = some((f"{rank}: {some(sorted(names))}" for rank, names in unseen.items()), "; ")
            raise UserError(
                f"output_dir: rank 0 cannot see all files that these ranks wrote to {folder}: {where}."
                " Every rank must write to the same disk: set output_dir to a folder that all machines share."
            )
        time.sleep(0.5)
    files = {name: entry for entries in digests_by_rank.values() for name, entry in entries.items()}
    twice = {n for entries in digests_by_rank.values() for n, entry in entries.items() if entry != files[n]}
    wrong = sorted(twice | set(odd) | (found.keys() ^ files.keys()) | {n for n in files if not is_plain(n)})
    if wrong:
        raise ValueError(f"{folder}: not vouched for by exactly one digest, or no plain files: {some(wrong)}")
    return files


def _entries(root: Path, *suffixes: str) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoint folders in `root` whose name ends in one of the suffixes ("": published)."""
    names = os.listdir(root) if root.is_dir() else []
    matches = [match for name in sorted(names) if (match := NAME.fullmatch(name)) and (match[2] or "") in suffixes]
    return [(int(match[1]), root / match[0]) for match in matches]


def _remove(folder: Path) -> None:
    """Delete a folder, its manifest first: what a kill leaves behind is then seen to be no checkpoint without reading
    it.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        if (folder / MANIFEST).exists():
            (folder / MANIFEST).unlink()
            sync_folder(folder)
        shutil.rmtree(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix(OLD) + ASIDE)
