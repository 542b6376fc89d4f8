"""Damaged checkpoints are noticed, named with file and problem, and the one before is chosen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from finetune.checkpoint import manifest, snapshots
from tests.support.kill_points import NAMES, flip, holds, save


@pytest.fixture
def two(tmp_path) -> Path:
    """Whole checkpoints of steps 10 and 20."""
    root = tmp_path / "checkpoints"
    save(root, 10, limit=2)
    save(root, 20, limit=2)
    return root


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "swapped": lambda path: shutil.copyfile(str(path).replace("step-20", "step-10"), path),
    "a link": lambda path: (path.rename(path.parents[2] / path.name), path.symlink_to(path.parents[2] / path.name)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_chosen(damage, name, two):
    DAMAGES[damage](two / "step-20" / name)
    said = []
    assert holds(snapshots.newest(two, said.append), 10)
    (message,) = said
    assert "step-20 is damaged" in message and name in message
    assert snapshots.verify(two / "step-10") == []
    if damage not in ("flipped", "swapped") or name == "manifest.json":
        assert snapshots.listing(two)[1].problems, "noticed without reading contents"


def test_what_does_not_belong_is_noticed(two):
    for extra in (two / "step-20" / "rank_1" / "more.bin", two / "step-20" / ".hidden"):
        extra.write_bytes(b"")
        assert snapshots.verify(two / "step-20") == [f"{extra.relative_to(two / 'step-20')} is not in manifest.json"]
        extra.unlink()
    (two / "step-20" / "link").symlink_to(two / "step-10")
    assert "link is neither a file nor a folder" in snapshots.verify(two / "step-20")[0]
    (two / "step-20" / "link").unlink()
    assert snapshots.verify(two / "step-20") == []


def test_every_byte_of_the_manifest_counts(tmp_path):
    folder = snapshots.start(tmp_path, 20)
    (folder / "a.bin").write_bytes(b"1234")
    path = (
        snapshots.publish(tmp_path, 20, {"rows": 1.5}, {"rank 0": snapshots.digest(folder, ["a.bin"])})
        / "manifest.json"
    )
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at, at % 8)
        assert snapshots.verify(path.parent, hashes=False), whole[max(at - 20, 0) : at + 20]
        path.write_bytes(whole)
    others = (b"[]", b"[" * 100_000, b"\xff", b"{}", b'{"format": "x"}')
    for changed in (whole + b"\n", whole.replace(b"\n", b"\r\n"), whole[:-1], *others):
        path.write_bytes(changed)
        assert snapshots.verify(path.parent, hashes=False)


def test_problems_say_which_file_and_what(two):
    step = two / "step-20"
    os.truncate(step / "weights.bin", 7)
    flip(step / "state.json")
    (step / "empty").unlink()
    assert snapshots.verify(step) == [
        "empty is missing",
        "weights.bin has 7 bytes instead of 400",
        "state.json: its sha256 differs",
    ]
    (step / "manifest.json").unlink()
    assert snapshots.verify(step) == ["manifest.json is missing"]
    assert snapshots.verify(two / "step-99") == ["manifest.json is missing"]


def test_folders_that_changed_places_are_damaged(two):
    shutil.rmtree(two / "step-20")
    shutil.copytree(two / "step-10", two / "step-20")
    assert snapshots.verify(two / "step-20") == ["manifest.json belongs to step 10, the folder to step 20"]
    (two / "step-30").symlink_to(two / "step-10")
    assert snapshots.verify(two / "step-30") == ["the folder is a symbolic link"]
    assert snapshots.newest(two, [].append).step == 10


@pytest.mark.parametrize("name", ["../../stolen", "/etc/passwd", "a/../b", "./a", "a//b", "a\\b", "", "manifest.json"])
def test_a_manifest_names_nothing_outside_its_folder(name, two):
    files = {name: snapshots.Digest("0" * 64, 1)}
    manifest.write_manifest(two / "step-20", 20, {}, files)
    assert "names files outside the folder" in snapshots.verify(two / "step-20")[0]


def test_a_newer_format_is_not_guessed_at(two):
    (two / "step-20" / "manifest.json").write_text('{"format": 2, "all": "different"}')
    assert snapshots.verify(two / "step-20") == ["manifest.json has format 2, this version reads 1"]


def test_the_hint_decides_nothing(two):
    for content in ("step-99\n", "step-10\n", ""):
        (two / "latest").write_text(content)
        assert snapshots.newest(two, pytest.fail).step == 20
    (two / "latest").unlink()
    assert snapshots.newest(two, pytest.fail).step == 20
    assert snapshots.newest(two / "nothing", pytest.fail) is None
