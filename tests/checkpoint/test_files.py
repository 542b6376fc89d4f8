"""Checkpoint folders under real faults: kills before every operation, torn writes, full disks, disks not shared."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.checkpoint import snapshots
from finetune.errors import UserError
from tests.support import kill_points
from tests.support.kill_points import facts, flip, holds, payload, save

ROOT = Path(__file__).resolve().parents[2]


def drive(what: str, scenario: str, folder: Path):
    """In a process of its own: it forks, and its audit hooks stay."""
    command = [sys.executable, kill_points.__file__, what, scenario, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def memory_folder(tmp_path):
    """A folder in memory where there is one: a kill needs no disk, and hundreds of saves fsync a lot."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = shared / f"finetune-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def two(tmp_path) -> Path:
    """Whole checkpoints of steps 10 and 20."""
    root = tmp_path / "checkpoints"
    save(root, 10, limit=2)
    save(root, 20, limit=2)
    return root


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


# ---- kills


@pytest.mark.parametrize("scenario", kill_points.SCENARIOS)
def test_a_kill_before_any_operation_leaves_the_old_or_the_new_checkpoint(scenario, memory_folder):
    result = drive("kill", scenario, memory_folder)
    assert result["wrong"] == []
    assert result["points"] >= 60 and result["torn"] >= 6
    assert result["old"] > 40 and result["new"] > 4, "the points lie on both sides of the publication"


@pytest.mark.parametrize("scenario", kill_points.SCENARIOS)
def test_everything_is_on_the_disk_before_the_next_thing_counts_on_it(scenario, tmp_path):
    root = tmp_path / "checkpoints"
    seen = drive("trace", scenario, root)
    partial, whole = str(root / "step-20.tmp"), str(root / "step-20")
    published = seen.index(["os.rename", partial, whole])
    hinted = seen.index(["os.rename", str(root / "latest.tmp"), str(root / "latest")])
    inside = [what for what in seen[:published] if len(what) > 1 and what[1].startswith(partial)]
    for path in {what[1] for what in inside if what[0] == "write"}:
        last_write = max(i for i, what in enumerate(seen) if what == ["write", path])
        assert ["fsync", path] in seen[last_write:published], path
    folders = {partial, *(what[1] for what in inside if what[0] == "os.mkdir")}
    assert len(folders) == 4
    for path in folders:
        last_entry = max(
            i
            for i, what in enumerate(seen[:published])
            if (what[0] == "os.mkdir" or (what[0] == "open" and what[1] not in folders))
            and os.path.dirname(what[1]) == path
        )
        assert ["fsync", path] in seen[last_entry:published], path
    assert ["fsync", str(root / "latest.tmp")] in seen[:hinted]
    assert ["fsync", str(root)] in seen[published:hinted]
    gone = [i for i, what in enumerate(seen) if i > published and what[0] in ("os.remove", "os.rmdir")]
    assert scenario == "fresh" or gone
    assert all(["fsync", str(root)] in seen[hinted:i] for i in gone)


# ---- saving over what is there


def test_a_whole_checkpoint_with_the_same_facts_is_left_alone(two):
    before = (two / "step-20" / "weights.bin").stat().st_ino
    save(two, 20, limit=2)
    assert (two / "step-20" / "weights.bin").stat().st_ino == before
    assert names(two) == ["latest", "step-10", "step-20"]


def test_other_facts_or_damage_are_replaced(two):
    save(two, 20, limit=2, salt=1)
    assert holds(snapshots.newest(two, pytest.fail), 20, salt=1)
    flip(two / "step-20" / "weights.bin")
    save(two, 20, limit=2, salt=1)
    assert holds(snapshots.newest(two, pytest.fail), 20, salt=1)
    assert names(two) == ["latest", "step-10", "step-20"]


def test_pruning_counts_whole_folders_and_keeps_the_best(tmp_path):
    for step in (5, 10, 20, 30):
        save(tmp_path, step, limit=9)
    os.truncate(tmp_path / "step-20" / "weights.bin", 1)
    save(tmp_path, 40, limit=2, protect=5)
    assert names(tmp_path) == ["latest", "step-30", "step-40", "step-5"]
    assert (tmp_path / "latest").read_text() == "step-40\n"
    os.truncate(tmp_path / "step-30" / "weights.bin", 1)
    save(tmp_path, 50, limit=2, protect=5)
    assert names(tmp_path) == ["latest", "step-40", "step-5", "step-50"]
    os.truncate(tmp_path / "step-50" / "weights.bin", 1)
    assert snapshots.prune(tmp_path, 50, limit=1) == []
    assert names(tmp_path) == ["latest", "step-40", "step-5", "step-50"]


def test_a_damaged_newest_folder_never_outlives_a_whole_older_one(two):
    flip(two / "step-20" / "weights.bin")
    save(two, 15, limit=1)
    assert holds(snapshots.newest(two, [].append), 15), "step 20 does not count as the one to keep"
    assert snapshots.retire(two, above=15) == [two / "step-20.aside"]
    assert holds(snapshots.newest(two, pytest.fail), 15)
    save(two, 25, limit=1)
    assert names(two) == ["latest", "step-25"]


# ---- several ranks, full disks


def test_files_that_rank_0_cannot_see_name_rank_and_files(two):
    folder = snapshots.start(two, 30)
    (folder / "here.bin").write_bytes(b"1234")
    here = snapshots.digest(folder, ["here.bin"])
    other = {"rank_1/gone.bin": snapshots.Digest("0" * 64, 4)}
    with pytest.raises(UserError, match=r"rank 1 on node7: rank_1/gone\.bin.*all machines share"):
        snapshots.publish(two, 30, {}, {"rank 0 on node6": here, "rank 1 on node7": other}, patience_seconds=0)
    assert names(two) == ["latest", "step-10", "step-20"]


def test_every_file_needs_exactly_one_digest(two):
    folder = snapshots.start(two, 30)
    (folder / "a.bin").write_bytes(b"1234")
    (folder / "b.bin").write_bytes(b"5678")
    digests = snapshots.digest(folder, ["a.bin"])
    with pytest.raises(ValueError, match="b.bin"):
        snapshots.publish(two, 30, {}, {"rank 0": digests}, patience_seconds=0)
    folder = snapshots.start(two, 30)
    (folder / "a.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="a.bin"):
        other = {"a.bin": snapshots.Digest("0" * 64, 4)}
        snapshots.publish(
            two, 30, {}, {"rank 0": snapshots.digest(folder, ["a.bin"]), "rank 1": other}, patience_seconds=0
        )
    assert names(two) == ["latest", "step-10", "step-20"]


@contextmanager
def files_up_to(limit_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit_bytes", [200, 900], ids=["a rank's file", "the manifest"])
def test_a_save_that_does_not_fit_leaves_the_older_ones(limit_bytes, two):
    with files_up_to(limit_bytes), pytest.raises(OSError):
        try:
            save(two, 30)
        except OSError:
            snapshots.discard(two, 30)
            raise
    assert names(two) == ["latest", "step-10", "step-20"]
    assert holds(snapshots.newest(two, pytest.fail), 20)
    save(two, 30)
    assert names(two) == ["latest", "step-30"]


def test_a_disk_that_fills_up_leaves_the_older_one(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        save(tmp_path / "checkpoints", 10)
        filler = tmp_path / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        for pages in range(16):  # noqa: B007 - read behind the loop; every page at which the save may run out of space
            try:
                save(tmp_path / "checkpoints", 20)
                break
            except OSError:
                snapshots.discard(tmp_path / "checkpoints", 20)
                assert holds(snapshots.newest(tmp_path / "checkpoints", pytest.fail), 10)
            os.truncate(filler, filler.stat().st_size - 4096)
        assert pages > 5
        assert holds(snapshots.newest(tmp_path / "checkpoints", pytest.fail), 20)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_missing_space_is_said_before_anything_is_written(tmp_path):
    root = tmp_path / "not" / "yet" / "there"
    assert snapshots.check_space(root, 1) is None
    assert "GiB are free" in snapshots.check_space(root, 1 << 60)
    assert not root.exists()


def test_a_snapshot_carries_its_facts_and_files(two):
    snapshot = snapshots.newest(two, pytest.fail)
    assert snapshot.facts == facts(20)
    assert {name: entry.bytes for name, entry in snapshot.files.items()} == {
        n: len(data) for n, data in payload(20).items()
    }
    assert [s.step for s in snapshots.listing(two)] == [10, 20]
