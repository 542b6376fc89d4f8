#!/usr/bin/env python3
"""Predicted against measured memory on the CPU, for docs/benchmarks/memory.md: real runs of one and two ranks.

    python -m scripts.benchmarks.memory [--out docs/benchmarks] [--only WORDS]

Every case is the trainer under `accelerate launch` for a few optimizer steps with a random model of 2 million
parameters; the figures are its run.json's. On the CPU device and host are one memory: what is compared are the storages
of all tensors at the peak of the largest micro-batch (finetune/engine/storages.py), and the resident memory of the
process."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from scripts.benchmarks.gpu_suite.memory import measure
from scripts.benchmarks.gpu_suite.run import PACKAGES, commit, version
from scripts.benchmarks.gpu_suite.setup import Setup, prepare_models

ROOT = Path(__file__).resolve().parents[2]

PLAIN = {"training.gradient_checkpointing": False}
LORA = {"lora.r": 16, "lora.alpha": 32}
DDP = {"ranks": 2}
BF16 = {"precision": "bf16"}


def zero(stage: int, ranks: int, optimizer: str = "none", parameters: str = "none", **more) -> dict:
    return {"zero_stage": stage, "ranks": ranks, "offload_optimizer": optimizer, "offload_param": parameters, **more}


# (name, launch, recipe keys, K)
CASES = [
    ("one process, K = 1", {}, {}, 1),
    ("one process, K = 4", {}, {}, 4),
    ("one process, no checkpointing, K = 1", {}, PLAIN, 1),
    ("one process, no checkpointing, K = 4", {}, PLAIN, 4),
    ("one process, bf16, K = 4", BF16, {}, 4),
    ("one process, bf16, no checkpointing, K = 4", BF16, PLAIN, 4),
    ("one process, LoRA, K = 4", {}, LORA, 4),
    ("one process, LoRA, bf16, no checkpointing, K = 1", BF16, LORA | PLAIN, 1),
    ("one process, QLoRA, K = 4", {}, LORA | {"model.load_in_4bit": True}, 4),
    ("one process, SGD, K = 4", {}, {"training.optim": "sgd"}, 4),
    ("one process, 8-bit AdamW, K = 4", {}, {"training.optim": "adamw_8bit"}, 4),
    ("DDP, 2 ranks, K = 1", DDP, {}, 1),
    ("DDP, 2 ranks, K = 4", DDP, {}, 4),
    ("DDP, 2 ranks, bf16, no checkpointing, K = 4", DDP | BF16, PLAIN, 4),
    ("DDP, 2 ranks, LoRA, K = 4", DDP, LORA, 4),
    ("ZeRO-1, 2 ranks, K = 4", zero(1, 2), {}, 4),
    ("ZeRO-2, 1 rank, K = 4", zero(2, 1), {}, 4),
    ("ZeRO-2, 2 ranks, K = 4", zero(2, 2), {}, 4),
    ("ZeRO-2, 2 ranks, bf16, K = 4", zero(2, 2, **BF16), {}, 4),
    ("ZeRO-2, 2 ranks, CPU offload, K = 4", zero(2, 2, "cpu"), {}, 4),
    ("ZeRO-2, 2 ranks, CPU offload, bf16, K = 4", zero(2, 2, "cpu", **BF16), {}, 4),
    ("ZeRO-3, 1 rank, K = 4", zero(3, 1), {}, 4),
    ("ZeRO-3, 2 ranks, K = 1", zero(3, 2), {}, 1),
    ("ZeRO-3, 2 ranks, K = 4", zero(3, 2), {}, 4),
    ("ZeRO-3, 2 ranks, bf16, K = 4", zero(3, 2, **BF16), {}, 4),
    ("ZeRO-3, 2 ranks, optimizer offload, K = 4", zero(3, 2, "cpu"), {}, 4),
    ("ZeRO-3, 1 rank, full offload, K = 4", zero(3, 1, "cpu", "cpu"), {}, 4),
    ("ZeRO-3, 2 ranks, full offload, K = 4", zero(3, 2, "cpu", "cpu"), {}, 4),
    ("ZeRO-3, 2 ranks, full offload, bf16, no checkpointing, K = 4", zero(3, 2, "cpu", "cpu", **BF16), PLAIN, 4),
    ("ZeRO-3, 2 ranks, full offload, LoRA, K = 4", zero(3, 2, "cpu", "cpu"), LORA, 4),
]


def run(name: str, layout: dict, overrides: dict, steps: int, setup: Setup) -> dict:
    """The figures of one case."""
    folder = setup.case_folder(name)
    folder.mkdir(parents=True)
    ranks = layout.get("ranks", 1)
    # the suite's recipe has one rank's rows in its global batch
    found = measure(
        setup, folder, layout, overrides | {"training.global_batch_size": setup.rows * steps * ranks}, steps
    )
    shutil.rmtree(folder)
    memory = found["memory"]
    return {
        "case": name,
        "exact": layout.get("zero_stage", 0) == 0 and ranks == 1,
        "micro_batch": found["micro_batch"],
        "set_by": found["peak"],
        "predicted_bytes": memory["predicted"]["step_bytes"],
        "measured_bytes": found["tracked_bytes"],
        "error": memory["error"]["tracked"],
        "predicted_process_bytes": memory["predicted"]["host_process"]["expected"],
        "measured_process_bytes": found["host_resident_bytes"],
        "process_error": memory["error"]["host"],
    }


def page(document: dict) -> str:
    """The document as Markdown."""
    rows = document["cases"]
    single = [row for row in rows if row["exact"]]
    others = [row for row in rows if not row["exact"]]
    worst = max(others, key=lambda row: abs(row["error"]), default=None)
    process = max(rows, key=lambda row: abs(row["process_error"]))
    lines = [
        "# Memory: predicted against measured, on the CPU",
        "",
        (
            f"Written by `{document['command']}` on {document['date']} at commit {document['commit']}: {len(rows)} real"
            " runs of"
        ),
        (
            f"{document['parameters']:,} parameters, micro-batches of {document['rows']} x {document['tokens']} tokens."
            f" {document['machine']}."
        ),
        " ".join(f"{package} {number}" for package, number in document["versions"].items()) + ".",
        "",
        (
            "Storages of all tensors at the peak of a step, rank 0. On the CPU the device's and the host's share are"
            " one memory. What one"
        ),
        "process takes is traced; of DDP and ZeRO activations and losses are, and the rest is arithmetic.",
        "",
        (
            f"- One process: {sum(row['predicted_bytes'] == row['measured_bytes'] for row in single)} of {len(single)}"
            f" cases to the byte; worst {max(abs(row['error']) for row in single):.2%}."
        ),
    ]
    if worst:
        lines.append(f"- DDP and ZeRO: {len(others)} cases, worst {worst['error']:+.1%} ({worst['case']}).")
    lines += [
        (
            "- Resident memory of the whole process (what it is before weights are read, tensors, and a constant for"
            " what is imported later, fitted\n  on an earlier run of these cases): worst"
            f" {process['process_error']:+.1%} ({process['case']}); these models are small beside the libraries."
        ),
        "",
        "| case | set by | predicted MiB | measured MiB | error | process, predicted MiB | measured | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [f"{row[key] / 2**20:,.2f}" for key in ("predicted_bytes", "measured_bytes")]
        error = "0 bytes" if row["predicted_bytes"] == row["measured_bytes"] else f"{row['error']:+.2%}"
        whole = [f"{row[key] / 2**20:,.0f}" for key in ("predicted_process_bytes", "measured_process_bytes")]
        lines.append(
            f"| {row['case']} | {row['set_by']} | {sizes[0]} | {sizes[1]} | {error} | {whole[0]} | {whole[1]} |"
            f" {row['process_error']:+.1%} |"
        )
    return "\n".join(lines) + "\n\nA GPU's figures: scripts/gpu_suite.sh.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="finetune-memory-") as folder:
        setup = Setup(Path(folder), small=True)
        prepared = prepare_models(setup, Path(folder))
        for name, layout, overrides, steps in CASES:
            if options.only not in name:
                continue
            began = time.monotonic()
            rows.append(run(name, layout, overrides, steps, setup))
            print(f"{name}: {rows[-1]['error']:+.2%}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    document = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m scripts.benchmarks.memory",
        "commit": commit(),
        "machine": f"CPU, {platform.machine()}, {platform.system()}",
        "parameters": prepared["parameters"]["small"],
        "rows": setup.rows,
        "tokens": setup.tokens,
        "versions": {package: version(package) for package in PACKAGES},
        "cases": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "memory.md").write_text(page(document))


if __name__ == "__main__":
    main()
