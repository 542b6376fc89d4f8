"""Saves a checkpoint in a child process that is killed before its n-th system operation, for every n: prints what was
wrong.

    python tests/support/kill_points.py kill SCENARIO FOLDER     {"points": .., "torn": .., "old": .., "new": ..,
    "wrong": [..]} python tests/support/kill_points.py trace SCENARIO FOLDER    [[operation, path, ...], ...] of one
    whole save

Operations: open, mkdir, rename, remove, rmdir (Python's audit events), fsync and write; a write is also cut in its
middle."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.checkpoint import snapshots

SCENARIOS = ("fresh", "limit_1", "replace_damaged", "replace_other_facts")
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
NAMES = (
    "state.json",
    "weights.bin",
    "rank_0/optimizer.bin",
    "rank_0/random.bin",
    "rank_1/optimizer.bin",
    "rank_1/deep/er.bin",
)


def payload(step: int, salt: int = 0) -> dict[str, bytes]:
    """Files of two ranks; two steps have the same names and lengths and other bytes."""
    files = {name: random.Random(f"{step} {salt} {name}").randbytes(300 + 100 * i) for i, name in enumerate(NAMES)}
    return files | {"empty": b""}


def write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)


def save(root: Path, step: int, limit: int = 1, salt: int = 0, protect: int | None = None) -> Path:
    folder = snapshots.start(root, step)
    files = payload(step, salt)
    for name, data in files.items():
        for parent in reversed((folder / name).relative_to(folder).parents[:-1]):
            if not (folder / parent).exists():
                os.mkdir(folder / parent)
        write(folder / name, data)
    ranks = {"rank 0 on a": [n for n in files if "rank_1" not in n], "rank 1 on b": [n for n in files if "rank_1" in n]}
    digests = {rank: snapshots.digest(folder, names, threads=1) for rank, names in ranks.items()}
    sealed = snapshots.publish(root, step, facts(step, salt), digests, patience_seconds=0)
    snapshots.prune(root, step, limit, protect)
    return sealed


def facts(step: int, salt: int = 0) -> dict:
    return {"position": {"step": step, "rows": 64 * step}, "world_size": 2, "recipe": f"recipe {salt}"}


def holds(snapshot: snapshots.Snapshot, step: int, salt: int = 0) -> bool:
    """Whether the folder is, byte for byte, what `save` wrote for this step."""
    there = {str(p.relative_to(snapshot.folder)): p.read_bytes() for p in snapshot.folder.rglob("*") if p.is_file()}
    there.pop(snapshots.MANIFEST)
    return (snapshot.step, there, snapshot.facts) == (step, payload(step, salt), facts(step, salt))


def flip(path: Path, at: int = 100, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def prepare(scenario: str, root: Path) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """((step, salt) of the checkpoint before, or None; of the one to save)."""
    if scenario == "fresh":
        return None, (20, 0)
    save(root, 10)
    if scenario == "limit_1":
        return (10, 0), (20, 0)
    save(root, 20, limit=2)
    if scenario == "replace_damaged":
        flip(root / "step-20" / "weights.bin")
        return (10, 0), (20, 0)
    return (20, 0), (20, 1)


def watch(seen: Callable[..., None]) -> None:
    """Call seen(operation, ...) before every operation of this process from now on; seen("torn", ..) after half a
    write.
    """
    fsync, os_write = os.fsync, os.write

    def write_halves(handle: int, data: bytes) -> int:
        seen("write", place(handle))
        if len(data) > 1:
            half = os_write(handle, data[: len(data) // 2])
            seen("torn", place(handle))
            return half + os_write(handle, data[half:])
        return os_write(handle, data)

    def fsync_seen(handle: int) -> None:
        seen("fsync", place(handle))
        fsync(handle)

    os.fsync, os.write = fsync_seen, write_halves
    sys.addaudithook(lambda event, args: seen(event, *map(str, args[:2])) if event in EVENTS else None)


def place(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def killed_at(point: int, root: Path, step: int, salt: int) -> str | None:
    """The operation before which the child was killed, or None: it came through."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def seen(operation: str, *_) -> None:
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGTERM if operation == "torn" else signal.SIGKILL)

        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as deadly, and tells the two apart
        try:
            watch(seen)
            save(root, step, salt=salt)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "torn" if os.WTERMSIG(status) == signal.SIGTERM else "operation"
    assert os.WEXITSTATUS(status) == 0, "the save itself failed"
    return None


def kill_everywhere(scenario: str, folder: Path) -> dict:
    template, root = folder / "template", folder / "run" / "checkpoints"
    old, new = prepare(scenario, template)
    result = {"points": 0, "torn": 0, "old": 0, "new": 0, "wrong": []}
    while True:
        shutil.rmtree(root.parent, ignore_errors=True)
        if template.exists():
            shutil.copytree(template, root)
        how = killed_at(result["points"] + 1, root, *new)
        said: list[str] = []
        found = snapshots.newest(root, said.append, threads=1)
        is_new = found is not None and holds(found, *new)
        is_old = found is None if old is None else found is not None and holds(found, *old)
        result["new"] += is_new
        result["old"] += is_old
        if not (is_new or is_old) or (how is None and not is_new) or (said and scenario != "replace_damaged"):
            result["wrong"].append(f"point {result['points'] + 1} ({how}): {found and found.folder}, said {said}")
        halves = [str(s.folder) for s in snapshots.listing(root) if s.problems]
        if halves:
            result["wrong"].append(f"point {result['points'] + 1} ({how}): half a folder under a valid name: {halves}")
        save(root, 30)
        after = snapshots.newest(root, said.append, threads=1)
        if after is None or not holds(after, 30) or sorted(os.listdir(root)) != ["latest", "step-30"]:
            result["wrong"].append(f"after point {result['points'] + 1} ({how}): {sorted(os.listdir(root))}")
        if how is None:
            return result
        result["points"] += 1
        result["torn"] += how == "torn"


def trace(scenario: str, folder: Path) -> list[list[str]]:
    _, (step, salt) = prepare(scenario, folder)
    operations: list[list[str]] = []
    watch(lambda *what: operations.append(list(what)))
    save(folder, step, salt=salt)
    return list(operations)


if __name__ == "__main__":
    print(json.dumps({"kill": kill_everywhere, "trace": trace}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))))
