"""Asked to stop in any way, a run saves at the next step, on all ranks the same one, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from finetune.checkpoint.snapshots import newest
from finetune.launch.start import free_port
from finetune.process.stop_signals import SECOND_SECONDS
from tests.support.launch import CONFIGS, ROOT, TRAIN, environment
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

LONG = ("training.max_steps=1000000", "checkpoint.save_steps=100000", "evaluation.eval_steps=1000000")


@dataclass
class Started:
    """A run that has logged some steps."""

    process: subprocess.Popen
    output: Path

    @property
    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def ranks(self) -> list[psutil.Process]:
        trainers = [p for p in self.below if any(part.endswith("train.py") for part in p.cmdline())]
        return [p for p in trainers if p.pid not in {q.ppid() for q in trainers}]


def accelerate_launch(config: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / config),
        "--main_process_port",
        str(free_port()),
        str(TRAIN),
    ]


def finetune_train(config: str) -> list[str]:
    return [sys.executable, "-m", "finetune", "train", "--launch", str(CONFIGS / config)]


WAYS: dict[str, tuple[list[str], Callable[[Started], object]]] = {
    "SIGTERM to accelerate launch, one process": (accelerate_launch("cpu.yaml"), lambda run: run.process.terminate()),
    "SIGTERM to accelerate launch, two ranks": (
        accelerate_launch("cpu_2_ranks.yaml"),
        lambda run: run.process.terminate(),
    ),
    "SIGKILL to accelerate launch, two ranks": (accelerate_launch("cpu_2_ranks.yaml"), lambda run: run.process.kill()),
    "SIGUSR1 to one of two ranks": (
        finetune_train("cpu_2_ranks.yaml"),
        lambda run: run.ranks[1].send_signal(signal.SIGUSR1),
    ),
    "SIGTERM to one of two ranks": (finetune_train("cpu_2_ranks.yaml"), lambda run: run.ranks[0].terminate()),
    "SIGTERM to the launcher below finetune train": (
        finetune_train("cpu_2_ranks.yaml"),
        lambda run: run.below[0].terminate(),
    ),
    "SIGKILL to the launcher below finetune train": (
        finetune_train("cpu_2_ranks.yaml"),
        lambda run: run.below[0].kill(),
    ),
    "SIGKILL to finetune train": (finetune_train("cpu_2_ranks.yaml"), lambda run: run.process.kill()),
    "SIGTERM to finetune train": (finetune_train("cpu.yaml"), lambda run: run.process.terminate()),
    "Ctrl-C in the terminal of finetune train": (
        finetune_train("cpu.yaml"),
        lambda run: os.killpg(run.process.pid, signal.SIGINT),
    ),
    "the launch script's own stop file": (finetune_train("cpu.yaml"), lambda run: (run.output.parent / "stop").touch()),
    "a STOP file, ZeRO-3 with offload": (
        finetune_train("zero3_offload_cpu_2_ranks.yaml"),
        lambda run: (run.output / "STOP").touch(),
    ),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("stop"))


def steps(output: Path) -> list[int]:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [row["step"] for row in map(json.loads, (line for line in lines if line.endswith("\n"))) if "loss" in row]


def wait_for(what: Callable[[], object], seconds: float, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        assert process is None or process.poll() is None, "the run ended by itself"
        time.sleep(0.1)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_asked_to_stop_saves_and_leaves_nothing_behind(way, recipe, tmp_path):
    command, ask = WAYS[way]
    env = environment(
        FINETUNE_CACHE=str(tmp_path.parent / "cache"), PYTHONPATH=str(ROOT), FINETUNE_STOP_FILE=str(tmp_path / "stop")
    )
    log = tmp_path / "log"
    output = tmp_path / "run"
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [*command, recipe, *LONG, f"output_dir={output}"],
            env=env,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
    run = Started(process, output)
    try:
        wait_for(lambda: len(steps(output)) >= 3, 120, process)
        if "STOP" in way:
            (output / "SAVE").touch()
            wait_for(lambda: not (output / "SAVE").exists() and (output / "checkpoints/latest").exists(), 60, process)
            saved = (output / "checkpoints/latest").read_text().strip()
            wait_for(lambda: steps(output)[-1] > int(saved.removeprefix("step-")), 60, process)
            shutil.rmtree(output / "checkpoints" / saved)
        everybody = [psutil.Process(process.pid), *run.below]
        ask(run)
        process.wait(60)
        _, alive = psutil.wait_procs(everybody[1:], timeout=10)
        assert not alive, ("left behind", [p.cmdline() for p in alive if p.is_running()], log.read_text()[-3000:])
    finally:
        for left in run.below if process.poll() is None else []:
            left.kill()
        process.kill()
    document = json.loads((output / "run.json").read_text())
    assert (document["status"], document["exit_code"]) == ("stopped", 3), log.read_text()[-3000:]
    (folder,) = (output / "checkpoints").glob("step-*")
    assert folder.name == f"step-{steps(output)[-1]}"
    if way == "SIGKILL to finetune train":
        assert process.returncode == -signal.SIGKILL
    elif "finetune" in command:
        assert process.returncode == 3
        assert log.read_text().rstrip().splitlines()[-1] == document["message"]
    assert "was saved to" in document["message"]
    assert os.listdir(output / "checkpoints").count("latest") == 1


def test_a_second_signal_ends_a_run_that_waits_and_the_checkpoint_before_stays(recipe, tmp_path):
    """Rank 1 stands still, so that rank 0 waits for it inside a collective, where Python runs no signal handler."""
    output, log = tmp_path / "run", tmp_path / "log"
    env = environment(FINETUNE_CACHE=str(tmp_path.parent / "cache"), PYTHONPATH=str(ROOT))
    long = [key for key in LONG if "save_steps" not in key]
    command = [*finetune_train("cpu_2_ranks.yaml"), recipe, *long, "checkpoint.save_steps=2", f"output_dir={output}"]
    with open(log, "w") as stderr:
        process = subprocess.Popen(command, env=env, stdout=stderr, stderr=stderr, start_new_session=True)
    run = Started(process, output)
    try:
        wait_for(lambda: len(steps(output)) >= 3, 120, process)
        everybody, (rank_0, rank_1) = run.below, run.ranks
        rank_1.suspend()
        time.sleep(1)
        process.terminate()
        time.sleep(SECOND_SECONDS + 0.5)
        assert rank_0.is_running() and process.poll() is None, "asked once, it waits"
        process.terminate()
        psutil.wait_procs([rank_0], timeout=5)
        assert not rank_0.is_running() or rank_0.status() == psutil.STATUS_ZOMBIE
        rank_1.resume()
        assert process.wait(20) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(everybody, timeout=10)
        assert not alive
    finally:
        for left in run.below if process.poll() is None else []:
            left.kill()
        process.kill()
    assert "stopped at once by a second SIGTERM" in log.read_text().rstrip().splitlines()[-1]
    found = newest(output / "checkpoints", print)
    assert found is not None and found.step >= 2 and found.step % 2 == 0
