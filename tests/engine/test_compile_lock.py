"""A build of DeepSpeed's C++ ops that was killed leaves a lock, and every later start would wait for it without a
word.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.engine.deepspeed.compile import stale_compile_locks
from tests.support.launch import CONFIGS, run, train
from tests.support.tiny_models import small_recipe


def lock_file(folder: Path) -> Path:
    lock = folder / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


@pytest.mark.slow
def test_a_start_that_would_hang_ends_in_seconds_and_names_the_file(tmp_path):
    recipe = small_recipe(tmp_path / "job")
    lock = lock_file(tmp_path / "extensions")
    status_file = tmp_path / "status.json"
    env = {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "FINETUNE_CACHE": str(tmp_path / "cache"),
        "FINETUNE_STATUS_FILE": str(status_file),
    }
    started = time.monotonic()
    done = train(CONFIGS / "zero3_offload_cpu_2_ranks.yaml", recipe, cwd=tmp_path, env=env, timeout=400)
    assert time.monotonic() - started < 90
    status = json.loads(status_file.read_text())
    assert (done.returncode, status["exit_code"]) == (1, 2)
    assert status["message"].endswith(f"rm {lock}")
    assert done.stderr.count(status["message"]) == 1, "rank 0 speaks for both"
    assert lock.exists(), "whether to remove it is the user's to say"


def test_no_lock_and_no_folder_are_fine(tmp_path):
    assert stale_compile_locks(tmp_path) == []
    assert stale_compile_locks(tmp_path / "nothing") == []


def test_a_lock_that_nobody_holds_is_stale_wherever_torch_builds(tmp_path, monkeypatch):
    of_a_python_version = lock_file(tmp_path / "torch_extensions" / "py311_cpu")
    assert stale_compile_locks(tmp_path / "torch_extensions") == [of_a_python_version]
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert stale_compile_locks() == [of_a_python_version]
    chosen = lock_file(tmp_path / "chosen")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert stale_compile_locks() == [chosen]


HOLD = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_lock_that_a_living_build_holds_is_not_stale_until_the_build_is_killed(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    builder = subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert builder.stdout.readline() == "held\n"
        assert lock.exists()
        assert stale_compile_locks(tmp_path) == []
    finally:
        builder.kill()
        builder.communicate()
    assert stale_compile_locks(tmp_path) == [lock]


def test_a_lock_that_was_released_is_gone(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    code = (
        "import sys; from torch.utils.file_baton import FileBaton as B; b = B(sys.argv[1]); b.try_acquire();"
        " b.release()"
    )
    assert run([sys.executable, "-c", code, lock]).returncode == 0
    assert stale_compile_locks(tmp_path) == []
