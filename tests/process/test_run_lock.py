"""One run per output folder: the lock of a living run holds, that of a killed one does not."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.process.run_lock import acquire

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
HOLD = """
import os, sys
from pathlib import Path
from finetune.errors import UserError
from finetune.process.run_lock import acquire
print("ready", flush=True)
sys.stdin.readline()
try:
    lock = acquire(Path(sys.argv[1]), say=lambda text: print(text, flush=True))
except UserError as error:
    sys.exit(f"{os.getpid()}: {error}")
if sys.argv[2:] == ["fork"]:
    born, say_born = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say_born, b".")
        sys.stdin.readline()
        os._exit(0)
    os.read(born, 1)
    print(child, flush=True)
print("held", lock.held, flush=True)
sys.stdin.readline()
"""


def holder(folder: Path, *arguments: str, before: str = "") -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", before + HOLD, folder, *arguments], text=True, env=ENV, **pipes)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    first = holder(tmp_path / "run")
    go(first)
    assert first.stdout.readline() == "held True\n"
    with pytest.raises(UserError, match=rf"pid {first.pid} on host {socket.gethostname()}, since 20.* UTC\)"):
        acquire(tmp_path / "run")
    first.kill()
    first.communicate()
    acquire(tmp_path / "run").release()


def test_two_that_race_never_both_win(tmp_path):
    for _ in range(5):
        both = [holder(tmp_path / "run") for _ in range(2)]
        for process in both:
            go(process)
        lines = [process.stdout.readline() for process in both]
        assert sorted(lines) == ["", "held True\n"]
        loser = both[lines.index("")]
        assert "is in use by another run" in loser.communicate()[1] and loser.returncode == 1
        winner = both[1 - lines.index("")]
        winner.kill()
        winner.communicate()


def test_an_orphan_of_a_killed_run_does_not_keep_its_lock(tmp_path):
    first = holder(tmp_path, "fork")
    go(first)
    orphan = int(first.stdout.readline())
    try:
        assert first.stdout.readline() == "held True\n"
        with pytest.raises(UserError):
            acquire(tmp_path)
        first.kill()
        first.wait()
        os.kill(orphan, 0)
        acquire(tmp_path).release()
    finally:
        os.kill(orphan, signal.SIGKILL)
        first.communicate()


def test_one_process_cannot_take_it_twice_and_a_forked_child_cannot_release_it(tmp_path):
    lock = acquire(tmp_path)
    with pytest.raises(UserError, match=f"pid {os.getpid()} "):
        acquire(tmp_path)
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(UserError, match=f"pid {os.getpid()} "):
        acquire(tmp_path)
    lock.release()
    lock.release()
    acquire(tmp_path).release()


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: .*file/run cannot be written"):
        acquire(tmp_path / "file" / "run")


# The kernel answers flock with ENOLCK ("No locks available"), as a network disk without a lock service does.
REFUSE = """
import ctypes, struct
instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x00050000 | 37), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(instructions), ctypes.addressof(program))), 0, 0) == 0
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the number of the flock call is not known here"
)
def test_a_filesystem_that_refuses_locks_is_said_and_the_run_goes_on(tmp_path):
    number = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    first = holder(tmp_path, before=REFUSE.format(number=number))
    go(first)
    assert "refuses locks (No locks available): nothing keeps a second run out" in first.stdout.readline()
    assert first.stdout.readline() == "held False\n"
    first.kill()
    first.communicate()
