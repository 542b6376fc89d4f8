"""`finetune train --launch X` and `finetune verify --launch X`: check first, then start `accelerate launch`.

The command ends with the trainer's own exit status and message.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.launch.preflight import first_stage
from finetune.launch.strategy import Strategy
from finetune.process import heartbeat, root_cause
from finetune.process.exit_status import REPORT_FILE
from finetune.process.heartbeat import SHARED_FOLDER
from finetune.process.host_memory import host_memory, kills_for_memory
from finetune.process.parent_death import signal_on_parent_death
from finetune.process.root_cause import RankExit

SAVING_SECONDS = 600  # how long torchrun waits for ranks that were asked to stop before it kills them


class LaunchedRunFailed(FinetuneError):
    """The launched trainer failed: `exit_code` is its exit status, the message is its last message."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.exit_code = code


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_train(recipe_path: str, overrides: Sequence[str], launch_file: str | None) -> None:
    """Check recipe and launch file, then launch the trainer and wait. Raises FinetuneError with its status."""
    strategy = first_stage(recipe_path, overrides, launch_file).strategy
    _launch(strategy, launch_file, [str(Path(__file__).resolve().parents[1] / "train.py"), recipe_path, *overrides], {})


def launch_verify(recipe_path: str, overrides: Sequence[str], launch_file: str, full: bool, as_json: bool) -> None:
    """Check recipe and launch file, launch the verification, print its report. Raises FinetuneError with its status."""
    strategy = first_stage(recipe_path, overrides, launch_file).strategy
    options = ["--full"] * full + ["--json"] * as_json
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        report = Path(folder) / "report"
        extra = {REPORT_FILE: str(report)}
        try:
            command = ["-m", "finetune", "verify", recipe_path, *overrides, *options]
            # the launcher, too, imports DeepSpeed, which prints to stdout: only the report belongs there
            _launch(strategy, launch_file, command, extra, stdout=2)
        finally:
            if report.exists():
                print(report.read_text(), flush=True)


def _launch(
    strategy: Strategy,
    launch_file: str | None,
    program: list[str],
    extra_environment: dict[str, str],
    stdout: int | None = None,
) -> None:
    if launch_file is None:
        command = [sys.executable, *program]
    else:
        command = [sys.executable, "-m", "finetune.launch.accelerate_launch", "--config_file", launch_file]
        if strategy.ranks > 1 and strategy.machines == 1:
            command += ["--main_process_port", str(free_port())]  # 29500, the default, is everybody's
        command += program
    # -m finds the package in an uninstalled checkout too
    above = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, SHARED_FOLDER: folder, "PYTHONPATH": os.pathsep.join(above), **extra_environment}
        environment["FINETUNE_REQUESTED_PROCESSES"] = str(strategy.ranks)
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))  # torchrun's own 30 s are no save
        kills = kills_for_memory()
        code = _run(command, environment, stdout)
        deaths = _deaths(Path(folder), code if launch_file is None else 0, kills_for_memory() > kills)
        end = root_cause.root_cause([*root_cause.recorded(Path(folder)), *deaths])
    if end in deaths:
        print(file=sys.stderr)  # it may have left a progress bar in the middle of a line
    if end is not None:
        raise LaunchedRunFailed(end.code, end.words)
    if code:
        message = f"the launched process exited with status {code} and printed no error"
        raise LaunchedRunFailed(code if code > 0 else 128 - code, message)


def _deaths(folder: Path, status: int, for_memory: bool) -> list[RankExit]:
    """How the ranks ended that recorded no end of their own.

    `status` is the exit status of the only process where there is no launcher, else 0. `for_memory` says that the
    kernel's out-of-memory killer has killed some process in the meantime.
    """
    said = {end.rank for end in root_cause.recorded(folder)}
    statuses = {seen.rank: seen for seen in heartbeat.rank_statuses(folder)}
    died = [json.loads(file.read_text()) for file in folder.glob("died-*.json")]
    if status:
        died.append({"rank": 0, "pid": 0, "status": status, "time": time.time()})
    found = []
    for death in died:
        rank, status = death["rank"], death["status"]
        if rank in said:
            continue
        name = statuses.get(rank) or f"rank {rank}"
        message = f"{name}: exited with status {status} and printed no error"
        if status < 0:
            message = f"{name}: killed by {_signal_name(-status)}"
        if status == -signal.SIGKILL:
            # probably: the kernel did so, to some process of this machine
            why = "probably" if for_memory else "possibly"
            message += f", {why} by the out-of-memory killer (host memory limit: {host_memory()})"
        code = status if status > 0 else 128 - status
        found.append(RankExit(rank, death["pid"], death["time"], code, message + ".", alone=True))
    return found


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _run(command: list[str], environment: dict[str, str], stdout: int | None) -> int:
    """Run the launcher to its end and return its exit status.

    SIGTERM and SIGINT are sent on to the ranks, which save: a launcher would leave them behind.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=stdout,
        # a terminal's Ctrl-C is for this process alone: it ends launchers before their ranks have saved
        start_new_session=True,
        preexec_fn=partial(signal_on_parent_death, signal.SIGTERM, os.getpid()),
    )

    def ranks() -> list[int]:
        statuses = heartbeat.rank_statuses(Path(environment[SHARED_FOLDER]))
        return [status.pid for status in statuses if root_cause.is_running(status.pid)]

    def forward(number: int, frame: object) -> None:
        pids = ranks()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not pids:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
        # a launcher that was killed leaves its ranks behind, which save: what they say counts
        deadline = time.monotonic() + SAVING_SECONDS
        while ranks() and time.monotonic() < deadline:
            time.sleep(0.1)
        return code
    finally:
        for number, old in before.items():
            signal.signal(number, old)
