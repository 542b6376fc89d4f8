"""Real runs whose processes are killed at random moments, then started again and compared with an unbroken one.

tests/reliability/test_random_kills.py runs one; scripts/benchmarks/reliability.py as many as it is told to."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from finetune.engine.deepspeed.compile import stale_compile_locks
from tests.support.launch import ROOT, environment, launch_file
from tests.support.resume_table import OFFLOAD, differences
from tests.support.tiny_models import small_recipe

LAUNCHES = {
    "one process": dict(ranks=1),
    "DDP on 2 ranks": dict(ranks=2),
    "ZeRO-2 on 2 ranks": dict(ranks=2, zero_stage=2),
    "ZeRO-3 with offload on 2 ranks": dict(ranks=2, **OFFLOAD),
}
SETTINGS = {
    "training.max_steps": 30,
    "checkpoint.save_steps": 1,
    "checkpoint.save_total_limit": 2,
    "evaluation.eval_steps": 10,
}
KILLS_PER_RUN = 3
SECONDS = 900  # for one launch


def say(text: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


@dataclass
class Bench:
    """What every part needs: a folder, a recipe, a launch file of each kind, and the unbroken runs so far."""

    folder: Path
    seed: int
    recipe: Path
    files: dict[str, Path]
    whole: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the unbroken run: whole launch, training
    locks: int = 0

    @property
    def env(self) -> dict[str, str]:
        return environment(PYTHONPATH=str(ROOT), FINETUNE_CACHE=str(self.folder / "cache"))

    def start(self, kind: str, output: Path, settings: dict = SETTINGS) -> subprocess.Popen:
        """`finetune train` under this launch, in a session of its own; its output goes to a file beside the folder."""
        command = [
            sys.executable,
            "-m",
            "finetune",
            "train",
            str(self.recipe),
            f"output_dir={output}",
            *(f"{key}={value}" for key, value in settings.items()),
            "--launch",
            str(self.files[kind]),
        ]
        with open(output.with_suffix(".log"), "w") as log:
            return subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def unbroken(self, kind: str) -> Path:
        """The output of a run of this kind that nobody disturbed."""
        if kind not in self.whole:
            output, began = self.folder / f"whole-{len(self.whole)}", time.monotonic()
            code = self.start(kind, output).wait(SECONDS)
            assert code == 0, output.with_suffix(".log").read_text()[-3000:]
            training = json.loads((output / "run.json").read_text())["summary"]["seconds"]
            self.seconds[kind], self.whole[kind] = (time.monotonic() - began, training), output
            say(f"{kind}: unbroken run, {self.seconds[kind][0]:.1f} s, {training:.1f} s of them training")
        return self.whole[kind]

    def remove_locks(self) -> None:
        """A kill while DeepSpeed looks at its compiled ops leaves a lock; the next start refuses and names it. Do what
        it says.
        """
        for lock in stale_compile_locks():
            self.locks += 1
            lock.unlink(missing_ok=True)


def make_bench(folder: Path, seed: int) -> Bench:
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    if extensions and Path(extensions).is_dir():  # locks left by our kills must not stop anybody else
        shutil.copytree(extensions, folder / "ops")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "ops")
    made = small_recipe(folder / "job")
    files = {kind: launch_file(folder / f"{i}.yaml", **layout) for i, (kind, layout) in enumerate(LAUNCHES.items())}
    return Bench(folder, seed, made, files)


def tree_of(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def left_behind(output: Path) -> list[psutil.Process]:
    """Living processes of this run, found by its folder on their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            f"output_dir={output}" == part for part in process.info["cmdline"] or ()
        ):
            found.append(process)
    return found


def steps_of(output: Path) -> int:
    file = output / "metrics.jsonl"
    return sum(b'"loss"' in line for line in file.read_bytes().splitlines()) if file.exists() else 0


def wait_for_step(process: subprocess.Popen, output: Path, more_than: int) -> None:
    end = time.monotonic() + SECONDS
    while process.poll() is None and steps_of(output) <= more_than and time.monotonic() < end:
        time.sleep(0.02)


def kill_chain(bench: Bench, kind: str, number: int, deadline: float) -> dict:
    """One run, all of its processes killed up to KILLS_PER_RUN times, then left to its end and compared with the
    unbroken one.
    """
    whole = bench.unbroken(kind)
    choose = random.Random(f"{bench.seed} kill {kind} {number}")
    output = bench.folder / f"killed-{number}"
    result: dict = {"launch": kind, "kills": [], "came_through": 0, "lost": "", "differences": [], "orphans": 0}
    for _ in range(KILLS_PER_RUN):
        at_start = choose.random() < 0.2  # else while it trains and saves
        delay = choose.uniform(0, 0.9 * bench.seconds[kind][not at_start])
        known = steps_of(output)
        process = bench.start(kind, output)
        if not at_start:
            wait_for_step(process, output, known)
        time.sleep(delay)
        if process.poll() is not None:
            result["came_through"] += 1
            break
        for one in tree_of(process):
            one.kill()
        process.wait(60)
        time.sleep(0.2)
        orphans = left_behind(output)
        result["orphans"] += len(orphans)
        for one in orphans:
            one.kill()
        bench.remove_locks()
        moment = {"after_seconds": round(delay, 3), "from": "start" if at_start else "first step"}
        result["kills"].append(moment | {"logged_steps": steps_of(output)})
        if time.monotonic() > deadline:
            break
    code = bench.start(kind, output).wait(SECONDS)
    if code != 0:
        result["lost"] = output.with_suffix(".log").read_text()[-2000:]
    else:
        result["differences"] = differences(output, whole)
        shutil.rmtree(output)
    result["orphans"] += len(left_behind(output))
    say(
        f"kill, {kind}: {len(result['kills'])} kills at logged steps {[k['logged_steps'] for k in result['kills']]},"
        f" lost: {bool(result['lost'])}, differences: {result['differences'][:2]}, orphans: {result['orphans']}"
    )
    return result
