"""docs/benchmarks/speed-cpu.md from the figures of scripts/benchmark.py."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import date
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "trl")
JOB = (
    "A random Llama with 25 million parameters and a vocabulary of 32,000, all weights trained with AdamW; chats"
    " of about 10 to 1,000 tokens, 16 rows per optimizer step, micro-batches of 4 rows (packed: 4,096 tokens), no"
    " gradient checkpointing. All contestants are alive at the same time and step in turn. Ratios are medians over"
    " the steps, each to HF Trainer in the same window. Tokens are counted without padding. Memory is the"
    " process's peak resident size less what it has after importing the libraries."
)
LOSSES = (
    "The held-out losses of HF Trainer and of the loops by hand agree, and ours differ a little. On the CPU torch"
    " adds the squares of the gradient up one after the other, so its norm for clipping is off by some 1e-5. This"
    " project computes it exactly (engine/clipping.py)."
)
PRECISIONS = {"no": "float32", "bf16": "bf16 mixed precision"}


def about(threads: int) -> dict[str, Any]:
    """Date, commit, versions and machine."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | versions,
        "cpu": _cpu(),
        "threads": threads,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def text(document: dict[str, Any]) -> str:
    """The page as Markdown."""
    about = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Speed on the CPU",
        "",
        f"Written by `python -m scripts.benchmark` on {about['date']} (commit {about['commit']}); raw figures in"
        f" `speed-cpu.json`. {about['cpu']}, {about['threads']} threads; {versions}.",
        "",
        JOB,
        "",
        LOSSES,
    ]
    for precision, one in document["races"].items():
        lines += ["", f"## {PRECISIONS[precision]}", ""]
        lines += ["| | tokens/s | trained tokens/s | CPU s per 1,000 tokens | speed / HF Trainer's (wall, CPU) |"]
        lines[-1] += " peak memory | / HF Trainer's | CPU s to the first step | held-out loss |"
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for name, row in one["table"].items():
            lines.append(
                f"| {name} | {row['tokens_per_second']:,.0f} | {row['trained_tokens_per_second']:,.0f}"
                f" | {row['cpu_seconds_per_1000_tokens']:.2f} | {row['wall_ratio']:.2f}, {row['cpu_ratio']:.2f}"
                f" | {row['training_bytes'] / 2**30:.2f} GiB | {row['memory_ratio']:.2f}"
                f" | {row['cpu_seconds_to_first_step']:.1f} | {row['held_out_loss']:.6f} |"
            )
    seconds = document.get("launched_cpu_seconds_to_first_step")
    if seconds:
        lines += ["", f"Launcher and trainer of `accelerate launch finetune/train.py` to the first step: {seconds:.1f}"]
        lines[-1] += " CPU seconds; the rows of the table are single processes that time their steps."
    return "\n".join(lines) + "\n"
