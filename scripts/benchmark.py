#!/usr/bin/env python3
"""Measure the speed of fine-tuning beside other tools and beside loops written by hand, on this machine.

    python -m scripts.benchmark [--out docs/benchmarks] [--steps 6] [--precisions no,bf16] [--only NAME,NAME] [--small]

All contestants train the same rows in the same windows. Each is a process of its own; they are alive at the same time
and do one optimizer step in turn, so that a busy machine slows all of them alike. A figure is the median over the steps
of ratios to Hugging Face's Trainer in the same window. Writes OUT/speed-cpu.json and OUT/speed-cpu.md. With --small a
tiny job of seconds, which writes nothing into the pages: does everything run?"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmarks.speed import contestants, page
from scripts.benchmarks.speed.job import SpeedJob, make_job

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP = 2  # steps that are not counted
FIRST = "HF Trainer"  # what the others are compared with
SECONDS = 900.0


class Contestant:
    """A process that steps when it is told to."""

    def __init__(self, name: str, file: Path, log: Path):
        self.name, self._log = name, log
        command = [sys.executable, "-m", "scripts.benchmarks.speed.contestants", name, str(file)]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    def step(self) -> dict[str, float]:
        """Let it do one optimizer step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, float]:
        """Its held-out loss and peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = self._answer()
        self._process.wait(SECONDS)
        return found

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)


def race(job: SpeedJob, names: list[str], steps: int) -> dict[str, Any]:
    """What each contestant did: its steps in turn, then its end."""
    file = job.write()
    # one after the other up to its first step, so that loading disturbs nobody
    running: list[Contestant] = []
    found: dict[str, Any] = {}
    try:
        for name in names:
            running.append(Contestant(name, file, Path(job.folder) / f"{name}.log"))
            found[name] = {"steps": [running[-1].step()]}
        for step in range(1, WARM_UP + steps):
            turn = step % len(running)
            for one in running[turn:] + running[:turn]:
                found[one.name]["steps"].append(one.step())
            print(f"  {job.precision}: step {step + 1} of {WARM_UP + steps}", file=sys.stderr, flush=True)
        for one in running:
            found[one.name] |= one.end()
    finally:
        for one in running:
            one.kill()
    return found


def window_tokens(job: SpeedJob, steps: int) -> list[dict[str, int]]:
    """Tokens without padding, and trained ones, of each window."""
    plan = contestants.prepared(job)
    return [
        {
            "tokens": sum(len(row.input_ids) for row in rows),
            "trained": sum(int((row.labels != contestants.IGNORED).sum()) for row in rows),
        }
        for rows, _ in zip(contestants.windows(plan), range(steps), strict=False)
    ]


def figures(found: dict[str, Any], tokens: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """Medians and ratios by contestant."""
    table = {}
    counted = range(WARM_UP, len(tokens))
    base = found.get(FIRST, next(iter(found.values())))
    for name, one in found.items():
        steps, first = one["steps"], base["steps"]
        table[name] = {
            "tokens_per_second": median(tokens[i]["tokens"] / steps[i]["wall"] for i in counted),
            "trained_tokens_per_second": median(tokens[i]["trained"] / steps[i]["wall"] for i in counted),
            "cpu_seconds_per_1000_tokens": median(1000 * steps[i]["cpu"] / tokens[i]["tokens"] for i in counted),
            "wall_ratio": median(first[i]["wall"] / steps[i]["wall"] for i in counted),
            "cpu_ratio": median(first[i]["cpu"] / steps[i]["cpu"] for i in counted),
            "cpu_seconds_to_first_step": steps[0]["cpu_from_start"],
            "peak_bytes": one["peak_bytes"],
            "training_bytes": one["peak_bytes"] - one["base_bytes"],
            "memory_ratio": (one["peak_bytes"] - one["base_bytes"]) / (base["peak_bytes"] - base["base_bytes"]),
            "held_out_loss": one["held_out_loss"],
        }
    return table


def launched_cpu_seconds(job: SpeedJob) -> float:
    """CPU seconds of launcher and trainer until `accelerate launch finetune/train.py` has done its first step."""
    import psutil

    output = Path(job.folder) / "launched"
    settings = ["training.max_steps=2", f"training.global_batch_size={job.window_rows}", f"output_dir={output}"]
    settings += [f"training.per_device_train_batch_size={job.micro_batch_rows}"]
    config = REPOSITORY / "accelerate_configs" / "cpu.yaml"
    command = ["accelerate.commands.launch", "--config_file", config, REPOSITORY / "finetune/train.py"]
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command), f"{job.folder}/recipe.yaml", *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics, root, used = output / "metrics.jsonl", psutil.Process(process.pid), 0.0
    while process.poll() is None:
        used = sum(sum(one.cpu_times()[:2]) for one in (root, *root.children(recursive=True)))
        if metrics.exists() and '"loss"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.terminate()
    process.wait()
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps that are counted")
    parser.add_argument("--precisions", default="no,bf16")
    parser.add_argument("--only", default="", help="contestants, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny job; JSON on stdout, no page")
    options = parser.parse_args()
    answer, sys.stdout = sys.stdout, sys.stderr  # libraries print when they are imported
    installed = [n for n in contestants.NAMES if not n.startswith("TRL") or importlib.util.find_spec("trl")]
    names = options.only.split(",") if options.only else installed
    document: dict[str, Any] = {"about": page.about(options.threads), "races": {}}
    with tempfile.TemporaryDirectory(prefix="finetune-speed-") as folder:
        model, rows, longest = ("small", 64, 120) if options.small else ("25m", 512, 1000)
        make_job(Path(folder), model, rows, 8 if options.small else 32, longest, seed=0)
        for precision in options.precisions.split(","):
            job = SpeedJob(folder, precision, window_rows=16, micro_batch_rows=4, threads=options.threads)
            found = race(job, names, options.steps)
            tokens = window_tokens(job, WARM_UP + options.steps)
            document["races"][precision] = {"windows": tokens, "raw": found, "table": figures(found, tokens)}
        if not options.only and not options.small:
            document["launched_cpu_seconds_to_first_step"] = launched_cpu_seconds(job)
    if options.small or options.only:
        print(json.dumps({p: one["table"] for p, one in document["races"].items()}, indent=1), file=answer)
        return
    (options.out / "speed-cpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (options.out / "speed-cpu.md").write_text(page.text(document), encoding="utf-8")
    print(f"wrote {options.out}/speed-cpu.md and speed-cpu.json", file=answer)


if __name__ == "__main__":
    main()
