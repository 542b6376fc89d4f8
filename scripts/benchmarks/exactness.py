#!/usr/bin/env python
"""Accumulation against one big batch under every engine, precision, rank count, kind of training and K.

    python -m scripts.benchmarks.exactness [--quick] [--seed 5] [--windows 2] [--output docs/benchmarks]

Writes exactness.md and exactness.json. 24 launches of at most two ranks on the CPU, 10 to 25 minutes; --quick takes the
launches of the test set. Needs the test requirements.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import tempfile
from pathlib import Path

from tests.support.exact_table import (
    AGAINST_FLOAT32,
    AGAINST_THE_ENGINE,
    ENGINES,
    EVERY_LAUNCH,
    KINDS,
    LAUNCHES,
    PRECISIONS,
    Launch,
)
from tests.support.launch import accelerate, launch_file, program
from tests.support.tiny_models import small_recipe

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes")


def measure(
    launch: Launch, recipe: Path, folder: Path, seed: int, windows: int, use_cpu: bool = True, report: bool = True
) -> dict:
    """One launch of tests/programs/exactness.py: its JSON with the launch's name; without `report` only what is
    asserted.

    Raises RuntimeError when it fails.
    """
    config, out = launch_file(folder / "launch.yaml", **launch.layout, use_cpu=use_cpu), folder / "out.json"
    out.unlink(missing_ok=True)
    done = accelerate(
        config, *program("exactness"), recipe, out, str(seed), str(windows), *["report"] * report, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{launch.name}: {done.stderr[-3000:]}")
    return {"launch": launch.name, "engine_name": launch.engine, "precision": launch.precision} | json.loads(
        out.read_text()
    )


def gradient_error(case: dict) -> float:
    """The worst window: relative L2 difference of the clipped gradient, or of its norm."""
    return max(max(w["update_difference"], abs(w["norm_ratio"] - 1)) for w in case["windows"])


def worst(found: list[dict], engine: str, precision: str, kind: str) -> dict[str, float]:
    """The worst figure over all ranks and windows of each quantity; {} where nothing ran."""
    figures: dict[str, list[float]] = {}
    for row in found:
        if (row["engine_name"], row["precision"]) != (engine, precision):
            continue
        for case in row["cases"]:
            if case["name"] == f"{kind}, SGD":
                figures.setdefault("gradient", []).append(gradient_error(case))
                figures.setdefault("same engine", []).append(case["from_yardstick"])
            if case["name"] in (f"{kind}, SGD", f"{kind}, AdamW"):
                figures.setdefault(case["optimizer"], []).append(case["weight_difference"])
    return {name: max(values) for name, values in figures.items()}


def table(found: list[dict]) -> list[str]:
    """Markdown: a line per engine, precision and kind of training."""
    columns = ("gradient", "same engine", "SGD", "AdamW, epsilon 1e-6", "AdamW, epsilon 1e-8")
    lines = [
        (
            "| engine | precision | training | gradient | same, against one batch of the same engine | weights, 4 SGD"
            " steps | 4 AdamW steps, epsilon 1e-6 | 4 AdamW steps, epsilon 1e-8 |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        for engine in ENGINES:
            for kind in KINDS:
                if figures := worst(found, engine, precision, kind):
                    name = "float32" if precision == "no" else precision
                    lines.append(
                        f"| {engine} | {name} | {kind} | " + " | ".join(f"{figures[c]:.1e}" for c in columns) + " |"
                    )
    return lines


def worst_float32(found: list[dict]) -> float:
    """The worst asserted float32 figure: gradients and weights, without AdamW at epsilon 1e-8."""
    kept = ("gradient", "same engine", "SGD", "AdamW, epsilon 1e-6")
    rows = [worst(found, engine, "no", kind) for engine in ENGINES for kind in KINDS]
    return max(row[name] for row in rows if row for name in kept)


def buffers(found: list[dict]) -> list[str]:
    """Markdown: what the dtype of DeepSpeed's gradient buffer costs over 64 micro-batches."""
    lines = ["| launch | rows | float32 buffer | bf16 buffer | ratio |", "|---|---|---|---|---|"]
    for row in found:
        cases = {case["name"]: case for case in row["cases"]}
        for rows in ("random", "repeated"):
            if f"{rows}, our buffer" in cases:
                ours, low = (cases[f"{rows}, {buffer} buffer"]["from_yardstick"] for buffer in ("our", "bf16"))
                ratio = f"{low / ours:.1f}" if ours else "exact"
                lines.append(f"| {row['launch']} | {rows} | {ours:.1e} | {low:.1e} | {ratio} |")
    return lines


def communication(found: list[dict]) -> list[str]:
    """Markdown: collectives of one rank in a window, as calls and elements in units of the model's parameters."""
    lines = ["| launch | K | collectives: calls, elements / parameters |", "|---|---|---|"]
    for row in found:
        for counted in row["communication"]:
            said = [
                f"{name} {c['calls']}" + (f", {c['elements'] / counted['parameters']:.3g}" if name != "scalars" else "")
                for name, c in counted["collectives"].items()
            ]
            lines.append(f"| {row['launch']} | {counted['K']} | {'; '.join(said)} |")
    return lines


def page(found: list[dict], command: str) -> str:
    """docs/benchmarks/exactness.md."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    limit = AGAINST_FLOAT32["no"]
    head = f"""\
# Exactness of gradient accumulation

Written by `{command}` on {datetime.date.today()}, on a CPU; {versions}.
{len(found)} launches: {"; ".join(r["launch"] for r in found)}.

Relative L2 differences from one big float32 batch without an engine; the worst over ranks and over windows of K = 1, 3,
8, 17 and random ones, with ragged rows, rows without a trained token and empty micro-batches (configured steps 8). A
tiny Llama; the model does not matter to what is tested.
Worst float32 figure: **{worst_float32(found):.1e}**, limit {limit:.0e}; AdamW with epsilon 1e-8,
which amplifies rounding where gradients are next to nothing, is reported and not held to it. Limits in bf16:
{AGAINST_FLOAT32["bf16"]:.1e} against float32, {AGAINST_THE_ENGINE["bf16"]:.1e} against one batch of the same engine
(`tests/support/exact_table.py` derives them)."""
    long = """\
## The dtype of the gradient buffer

bf16 under DeepSpeed, 64 micro-batches, `data_types.grad_accum_dtype` fp32 (ours) and bf16. "random": random rows
against one batch under the same engine; both columns carry the rounding of every micro-batch's own bf16 gradient.
"repeated": one micro-batch 64 times against once, where only the buffer can lose bits."""
    traffic = """\
## Communication

Full fine-tuning, 2 ranks, counted by torch's profiler on the process group in the third window of each K. Elements are
those that one rank hands in, divided by the model's parameters. "scalars" are at most 8 elements: gradient norms and
overflow flags. Our own sums of scalars, the window's trained tokens before it and its loss after it, are left out."""
    parts = [head, "\n".join(table(found)), long, "\n".join(buffers(found)), traffic, "\n".join(communication(found))]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the launches of the test set")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2, help="random windows per kind of training and launch")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="finetune-exactness-") as name:
        recipe = small_recipe(Path(name) / "recipe")
        for launch in LAUNCHES if options.quick else EVERY_LAUNCH:
            found.append(measure(launch, recipe, Path(name), options.seed, options.windows))
            print(f"{launch.name}: done", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "exactness.json").write_text(json.dumps(found) + "\n")
    chosen = ["--quick"] * options.quick + [f"--seed {options.seed}", f"--windows {options.windows}"]
    command = " ".join(["python -m scripts.benchmarks.exactness", *chosen])
    (options.output / "exactness.md").write_text(page(found, command))
    print(f"worst float32 figure {worst_float32(found):.2e}, limit {AGAINST_FLOAT32['no']:.0e}")
    if worst_float32(found) > AGAINST_FLOAT32["no"]:
        raise SystemExit(4)


if __name__ == "__main__":
    main()
