"""Imports torch, transformers, DeepSpeed and the rest once, then forks the ranks of every launch that it is asked for.

Arguments: socket padding. tests/support/forked.py starts it and speaks to it. Each launch is forked from here and is a
process of its own, as `accelerate launch` is: accelerate's own code reads the command line and makes the environment,
and only where it would start an interpreter, or torchrun would, a fork becomes the rank. The padding is room for the
command line that a process shows: the trainer looks for its launcher there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from finetune.process.parent_death import signal_on_parent_death

Program = tuple[list[str], list[dict[str, str]]]  # the words after the interpreter, and the environment of each rank
LIBRARIES = (
    *("torch.distributed.run", "torch.profiler", "torch._inductor.compile_fx", "torch._subclasses.fake_tensor"),
    *("accelerate.commands.launch", "transformers.models.llama.modeling_llama", "datasets", "safetensors.torch"),
    *("peft.peft_model", "peft.tuners", "bitsandbytes.optim", "deepspeed.checkpoint", "deepspeed.ops.adam"),
    *("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.bf16_optimizer"),
    *("finetune.recipe.load", "finetune.launch.compatibility", "finetune.memory.formulas"),
)
KILL_SECONDS = 30  # between SIGTERM and SIGKILL, as torchrun


class Started(Exception):
    """Where a launcher would start ranks."""

    def __init__(self, program: Program):
        self.program = program


class Become(BaseException):
    """In a fork: leave every frame of the launcher and be this rank."""

    def __init__(self, words: list[str], environ: dict[str, str]):
        self.words, self.environ = words, environ


def import_libraries() -> None:
    """What every launch imports, and nothing that runs: a fork must find one thread and no state."""
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not sys.modules["torch"].cuda.is_initialized()
    assert "finetune.process.heartbeat" not in sys.modules, "it remembers whose process it is in"
    gc.collect()
    gc.freeze()  # or the first collection of a fork writes to, and so copies, every page


def serve(path: str) -> socket.socket:
    """Fork for every connection, until standard input ends; returns in the forks, with the connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(16)
    os.rename(path + ".new", path)  # whoever sees it can connect
    mine = os.getpid()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
        reap()
        if sys.stdin in ready:
            sys.exit(0)
        if listener in ready:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                os.setsid()
                signal_on_parent_death(signal.SIGKILL, mine)
                return connection
            connection.close()


def reap() -> None:
    """Forget the forks that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def show(words: list[str]) -> None:
    """Have /proc show these words as this process's command line, in the place of those it was started with."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, words)) + b"\0"
    assert len(text) <= end - start, "the padding is too short"
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def redirect(request: dict) -> None:
    """Folder, environment and streams as the request wants them."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    for handle, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, handle)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def plan(arguments: list[str], scratch: str) -> Program:
    """What `accelerate launch` of these arguments would start: read and decided by accelerate itself."""
    import torch.distributed.run
    from accelerate.commands import launch

    def one(words: list[str], env: dict[str, str]):
        raise Started((words[1:], [env]))

    def several(args):
        words = ["-m"] * bool(args.module) + [args.training_script, *args.training_script_args]
        raise Started((words, [rank_environment(args, rank, scratch) for rank in range(int(args.nproc_per_node))]))

    launch.subprocess = SimpleNamespace(Popen=one)
    torch.distributed.run.run = several
    sys.argv = ["accelerate-launch", *arguments]
    try:
        launch.main()
    except Started as started:
        return started.program
    raise AssertionError("accelerate started nothing")


def rank_environment(args, rank: int, scratch: str) -> dict[str, str]:
    """What torchrun's agent adds to its own environment for a rank on one machine."""
    count = str(args.nproc_per_node)
    folder = Path(scratch) / "attempt_0" / str(rank)
    folder.mkdir(parents=True)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank), "GROUP_RANK": "0"}
    worlds = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "ROLE_WORLD_SIZE": count, "GROUP_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.master_port), "ROLE_NAME": "default"}
    elastic = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none"}
    elastic |= {"TORCHELASTIC_ERROR_FILE": str(folder / "error.json"), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    elastic |= {"TORCHELASTIC_SIGNALS_TO_HANDLE": args.signals_to_handle, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    return {**os.environ, **ranks, **worlds, **address, **elastic}


def start(program: Program) -> list[int]:
    """Fork every rank; their process ids. Raises Become in the forks."""
    words, environs = program
    mine, started = os.getpid(), []
    for environ in environs:
        pid = os.fork()
        if pid == 0:
            signal_on_parent_death(signal.SIGKILL, mine)
            raise Become(words, environ)
        started.append(pid)
    return started


def wait(pids: list[int]) -> list[int]:
    """The ranks' exit statuses, as subprocess gives them. Once one has failed the others are asked to end, then
    killed."""
    codes: dict[int, int] = {}
    asked = 0.0
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = set(pids) - set(codes)
        if any(codes.values()) and not asked:
            asked = time.monotonic()
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        elif asked and time.monotonic() - asked > KILL_SECONDS:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def launch(connection: socket.socket) -> None:
    """One launch: its request is read from the connection, its end is written there. Raises Become in its ranks."""
    connection.sendall(f"{os.getpid()}\n".encode())
    request = json.loads(connection.makefile().readline())
    redirect(request)
    show(request["command"])
    words = request["command"][1:]
    program = plan(words[2:], request["scratch"]) if request["launcher"] else (words, [dict(os.environ)])
    codes = wait(start(program))
    connection.sendall(json.dumps(codes).encode() + b"\n")


def run(rank: Become) -> None:
    """Be the rank: what the interpreter does with these words and this environment."""
    os.environ.clear()
    os.environ.update(rank.environ)
    show([sys.executable, *rank.words])
    if rank.words[0] == "-m":
        sys.argv = rank.words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(rank.words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rank.words
        sys.path[0] = str(Path(rank.words[0]).parent)
        runpy.run_path(rank.words[0], run_name="__main__")


def main() -> Become | None:
    import_libraries()
    connection = serve(sys.argv[1])
    try:
        launch(connection)
    except Become as rank:
        connection.close()
        return rank
    return None


if __name__ == "__main__":
    if become := main():
        run(become)
