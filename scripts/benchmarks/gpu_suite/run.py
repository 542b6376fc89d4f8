#!/usr/bin/env python
"""Memory, exactness and throughput on one GPU, in under ten minutes; with --cpu-small the same code, tiny, on the CPU.

    scripts/gpu_suite.sh [--out docs/benchmarks] [--only NAMES] [--minutes 9] [--cpu-small]

Writes OUT/gpu_suite.json and OUT/gpu_suite.md, again after every case. Models have random weights and are made on the
spot; nothing is downloaded. Every case is a process with a time limit of its own: one that fails, is killed or hangs is
a line of the result. Cases stand in the order of their importance; what does not fit into the minutes is listed as not
run. Needs the packages of setup.cfg. Ends with status 4 when a case did not end well or a figure is beyond its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from scripts.benchmarks.gpu_suite.cases import CASES, Case
from scripts.benchmarks.gpu_suite.page import beyond, page, with_overheads
from scripts.benchmarks.gpu_suite.setup import NotRun, Setup

ROOT = Path(__file__).resolve().parents[3]

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")
ALL_OF = "GPU_SUITE_CASE"  # in the environment of all that a case starts: its process id
LAST_LINES = 15  # of a failed case's output
TOGETHER = {True: 2, False: 6}  # cases at once, where they do not measure the device; by --cpu-small
# float32 must be float32: cuBLAS obeys this before anything a library may set (torch's own default is off, too)
ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

RUNNING: set[subprocess.Popen] = set()


def say(text: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def run_case(case: Case, setup: Setup, deadline: float) -> dict:
    """The case in a process of its own: its row of the result. Whatever happens to it, everything it started is gone
    afterwards.
    """
    row = {
        "name": case.name,
        "group": case.group,
        "status": "not run",
        "why": "",
        "seconds": 0.0,
        "figures": None,
        "output": [],
    }
    if setup.small and case.not_on_cpu:
        return row | {"why": case.not_on_cpu}
    left = deadline - time.monotonic()
    if left < case.seconds(setup.small):
        return row | {"why": "time"}
    folder = setup.case_folder(case.name)
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        __file__,
        "--run-case",
        case.name,
        "--work",
        str(setup.folder),
        *["--cpu-small"] * setup.small,
    ]
    began = time.monotonic()
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"FINETUNE_CACHE": str(setup.folder / "cache")},
        )
    RUNNING.add(process)
    try:
        code = process.wait(min(left, case.limit_seconds(setup.small)))
        row["status"], row["why"] = ("done", "") if code == 0 else ("failed", how(code))
    except subprocess.TimeoutExpired:
        row["status"], row["why"] = "timeout", f"not done after {time.monotonic() - began:.0f} s"
    finally:
        end(process)
        RUNNING.discard(process)
    if row["status"] != "done":
        remove_locks()
    row["seconds"] = round(time.monotonic() - began, 1)
    figures = folder / "figures.json"
    if row["status"] == "done":
        found = json.loads(figures.read_text())
        if isinstance(found, str):
            row |= {"status": "not run", "why": found}
        else:
            row["figures"] = found
    else:
        row["output"] = (folder / "output").read_text(errors="replace").splitlines()[-LAST_LINES:]
    shutil.rmtree(folder, ignore_errors=True)  # its checkpoints and models
    return row


def how(code: int) -> str:
    """An exit status in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def end(process: subprocess.Popen) -> None:
    """Kill the case's process and all that it started: torchrun's workers lead sessions of their own."""
    process.kill()
    while found := started_in(process.pid):
        for one in found:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(found, timeout=5)
    process.wait()


def started_in(case: int) -> list[psutil.Process]:
    """Living processes whose environment says that they belong to the case of this process id."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if one.status() != psutil.STATUS_ZOMBIE and one.environ().get(ALL_OF) == str(case):
                found.append(one)
    return found


def remove_locks() -> None:
    """Whoever is killed while DeepSpeed builds an op leaves a lock behind, which every later case would refuse to start
    with.
    """
    from finetune.engine.deepspeed.compile import stale_compile_locks

    for lock in stale_compile_locks():
        lock.unlink(missing_ok=True)


def inside(name: str, setup: Setup) -> None:
    """The case's own process: figures.json in its folder, or why it cannot run here. Raises what the case raises."""
    os.environ[ALL_OF] = str(os.getpid())
    folder = setup.case_folder(name)
    try:
        found = CASES[name].run(setup, folder)
    except NotRun as reason:
        found = str(reason)
    (folder / "figures.json").write_text(json.dumps(found))


def run_all(cases: list[Case], setup: Setup, minutes: float, done) -> list[dict]:
    """Rows of all cases, in their order; `done(rows)` after each. Cases of a stage that measure no device run
    together.
    """
    deadline = time.monotonic() + 60 * minutes
    rows: dict[str, dict] = {}
    lock = threading.Lock()

    def one(case: Case) -> None:
        row = run_case(case, setup, deadline)
        with lock:
            rows[case.name] = row
            say(f"{case.name}: {row['status']}{', ' * bool(row['why'])}{row['why']}, {row['seconds']} s")
            done([rows[c.name] for c in cases if c.name in rows])

    for (_, alone), stage in itertools.groupby(cases, lambda c: (c.stage, c.alone and not setup.small)):
        with ThreadPoolExecutor(1 if alone else TOGETHER[setup.small]) as pool:
            list(pool.map(one, stage))
    return [rows[c.name] for c in cases]


def commit() -> str:
    """The commit of this checkout, with "dirty" where it was changed. Of a copy without git what GPU_SUITE_COMMIT says,
    or "unknown".
    """
    try:
        name, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GPU_SUITE_COMMIT", "unknown")
    return name + " dirty" * bool(changed)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def chosen(only: str) -> list[Case]:
    """The cases whose names or groups are in the list, and what they need. Raises ValueError for a name that is
    none.
    """
    if not only:
        return [case for case in CASES.values() if not case.hidden]
    wanted = [word.strip() for word in only.split(";")]
    unknown = [word for word in wanted if not any(word in (case.name, case.group) for case in CASES.values())]
    if unknown:
        names = "\n  ".join(case.name for case in CASES.values() if not case.hidden)
        raise ValueError(
            f"--only {unknown[0]!r} is neither a group nor a case. Several are separated by ';'. Cases:\n  {names}"
        )
    found = [case for case in CASES.values() if case.name in wanted or case.group in wanted]
    needed = {name for case in found for name in case.needs}
    return [case for case in CASES.values() if case in found or case.name in needed]


def work_folder(small: bool) -> str:
    """Where models and checkpoints go: memory where there is plenty, so that no figure waits for a disk."""
    shared = Path("/dev/shm")
    plenty = not small and shared.is_dir() and shutil.disk_usage(shared).free > 40 * 2**30
    return str(shared) if plenty else tempfile.gettempdir()


def stop(number: int, frame: object) -> None:
    """On SIGTERM: nothing of a case stays behind. What is done so far has been written."""
    for process in tuple(RUNNING):
        end(process)
    os._exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the result; docs/benchmarks, but needed with --cpu-small")
    parser.add_argument("--only", default="", help="names of cases or groups, separated by ';'")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case runs longer than this from the start")
    parser.add_argument("--cpu-small", action="store_true", help="the same cases, tiny, on the CPU")
    parser.add_argument("--work", type=Path, help="folder for models and checkpoints while the suite runs")
    parser.add_argument("--run-case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_case:
        return inside(options.run_case, Setup(options.work, options.cpu_small))
    if options.cpu_small and not options.out:
        parser.error("--cpu-small needs --out FOLDER: its figures are no benchmark")
    try:
        cases = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    out = options.out or ROOT / "docs/benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(
            [
                "scripts/gpu_suite.sh",
                *(["--only", options.only] if options.only else []),
                *["--cpu-small"] * options.cpu_small,
            ]
        ),  # without this machine's folders
        "commit": commit(),
        "small": options.cpu_small,
        "minutes": options.minutes,
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES},
        "environment": ENVIRONMENT,
    }

    def write(rows: list[dict]) -> None:
        found = with_overheads(document | {"cases": rows})
        for name, text in (("gpu_suite.json", json.dumps(found, indent=1) + "\n"), ("gpu_suite.md", page(found))):
            (out / f".{name}").write_text(text)
            (out / f".{name}").replace(out / name)

    signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix="finetune-suite-", dir=options.work or work_folder(options.cpu_small), ignore_cleanup_errors=True
    ) as folder:
        setup = Setup(Path(folder), options.cpu_small)
        rows = run_all(cases, setup, options.minutes, write)
        shutil.rmtree(setup.disk, ignore_errors=True)
    write(rows)
    bad = [row["name"] for row in rows if row["status"] in ("failed", "timeout")] + beyond(rows)
    say(
        f"{time.monotonic() - began:.0f} s; wrote {out / 'gpu_suite.md'}; "
        + (f"not well: {'; '.join(bad)}" if bad else "all well")
    )
    raise SystemExit(4 if bad else 0)


if __name__ == "__main__":
    main()
