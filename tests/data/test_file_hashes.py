"""A file that looks as it did is not read again; one that may have changed is."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from finetune.data import file_hashes
from finetune.data.file_hashes import file_hash


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", 0.05)
    path = tmp_path / "rows.jsonl"
    path.write_text("one\n")
    return path


def of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reads(monkeypatch) -> list[Path]:
    seen: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: seen.append(self) or real(self, *a, **k))
    return seen


def test_a_settled_file_is_read_once(file, monkeypatch):
    time.sleep(0.1)
    seen = reads(monkeypatch)
    assert file_hash(file) == file_hash(file) == of("one\n")
    assert seen.count(file) == 1


def test_a_file_that_changed_just_now_is_read_every_time(file, monkeypatch):
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", 60.0)
    seen = reads(monkeypatch)
    assert file_hash(file) == file_hash(file) == of("one\n")
    assert seen.count(file) == 2 and not list(file.parent.glob("cache/hashes/*"))


@pytest.mark.parametrize("how", ["in place", "with its old time", "another in its place"])
def test_a_change_is_noticed(file, how):
    time.sleep(0.1)
    assert file_hash(file) == of("one\n")
    before = file.stat()
    if how == "another in its place":
        other = file.with_name("other")
        other.write_text("two\n")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(file)
    else:
        file.write_text("two\n")
        if how == "with its old time":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.1)
    assert file_hash(file) == of("two\n")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"look": 3, "sha256": "x"}'])
def test_a_damaged_note_is_ignored(file, text):
    time.sleep(0.1)
    file_hash(file)
    (note,) = file.parent.glob("cache/hashes/*.json")
    note.write_text(text)
    assert file_hash(file) == of("one\n")


def test_a_cache_that_cannot_be_written_costs_time_only(file, monkeypatch):
    time.sleep(0.1)
    monkeypatch.setenv("FINETUNE_CACHE", str(file))  # a file, no folder
    assert file_hash(file) == file_hash(file) == of("one\n")
