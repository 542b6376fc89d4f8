#!/usr/bin/env python3
"""Draw what scripts/benchmarks/accumulation.py measured: three SVG files and the tables of
docs/benchmarks/accumulation.md.

python -m scripts.benchmarks.accumulation_plots [--folder docs/benchmarks]        needs matplotlib: pip install -e
'.[docs]' -c constraints.txt"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[2]
ITEMS = {
    "Parameter": "parameters",
    "Optstate": "optimizer state",
    "Gradient": "gradients",
    "Activation": "activations",
    "Temp": "temporary",
}
COLORS = ("#4c6a92", "#8aa6c8", "#d1495b", "#edae49", "#c9c9c9")
MIB = 2**20


def style() -> None:
    plt.rcParams.update(
        {
            "svg.hashsalt": "finetune",
            "svg.fonttype": "none",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "white",
        }
    )


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {file}")


def draw_memory(cases: list[dict], file: Path) -> None:
    """Stacked bytes at the peak of a step, by item."""
    figure, panes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    for pane, checkpointing in zip(panes, (False, True), strict=True):
        chosen = [case for case in cases if case["checkpointing"] == checkpointing]
        labels = [f"{case['name']}\n{case['K']} × {case['rows_per_step'] // case['K']} rows" for case in chosen]
        bottom = [0.0] * len(chosen)
        for (key, name), color in zip(ITEMS.items(), COLORS, strict=True):
            heights = [case["bytes"][key] / MIB for case in chosen]
            pane.bar(labels, heights, bottom=bottom, color=color, label=name, width=0.65)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        for x, total in enumerate(bottom):
            pane.text(x, total, f"{total:,.0f}", ha="center", va="bottom")
        pane.set_title(
            "with gradient checkpointing" if checkpointing else "without gradient checkpointing", fontsize=10
        )
        pane.tick_params(axis="x", labelsize=8)
    panes[0].set_ylabel("MiB at the peak of a step")
    panes[1].legend(frameon=False)
    save(figure, file)


def draw_raggedness(cases: list[dict], chats: dict, file: Path) -> None:
    """Relative gradient error over the raggedness of the rows."""
    figure, pane = plt.subplots(figsize=(6.5, 4))
    spreads = [case["spread"] for case in cases]
    for name, color in (("mean of means", COLORS[2]), ("window denominator", COLORS[0])):
        middle = [statistics.median(case[name]) for case in cases]
        pane.plot(spreads, middle, "o-", color=color, label=name)
        pane.fill_between(
            spreads, [min(c[name]) for c in cases], [max(c[name]) for c in cases], color=color, alpha=0.2, lw=0
        )
    real = chats["mean of means"]
    pane.errorbar(
        [chats["spread"]],
        [statistics.median(real)],
        [[statistics.median(real) - min(real)], [max(real) - statistics.median(real)]],
        fmt="s",
        color="black",
        capsize=3,
        label="mean of means, the quick start's chats",
    )
    pane.set_yscale("log")
    pane.set_xlabel("spread of trained tokens per row (standard deviation / mean)")
    pane.set_ylabel("gradient error against one batch")
    pane.legend(frameon=False, loc="center right")
    save(figure, file)


def draw_throughput(found: dict[str, list[dict]], file: Path) -> None:
    """Trained tokens per second against K."""
    figure, pane = plt.subplots(figsize=(6.5, 4))
    for (name, cases), color in zip(found.items(), COLORS, strict=False):
        ks = [case["K"] for case in cases]
        pane.plot(ks, [case["tokens_per_second"] for case in cases], "o-", color=color, label=name)
    pane.set_xscale("log", base=2)
    pane.set_xticks(ks, [str(k) for k in ks])
    pane.set_ylim(bottom=0)
    pane.set_xlabel("K, micro-batches per optimizer step (same micro-batch)")
    pane.set_ylabel("trained tokens per second")
    pane.legend(frameon=False)
    save(figure, file)


def tables(document: dict) -> str:
    """Markdown of every figure."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    days = sorted(set(document["measured"].values()))
    lines = [
        "# Accumulation, measured",
        "",
        (
            f"By `python -m scripts.benchmarks.accumulation` on {' and '.join(days)}; {document['machine']};"
            f" {versions}; float32."
        ),
        "Drawn and written by `python -m scripts.benchmarks.accumulation_plots`.",
        "",
    ]
    parameters, tokens = document["memory"][0]["parameters"], 512
    lines += [
        "## Memory at the peak of a step, MiB",
        "",
        (
            f"A Llama with {parameters / 1e6:.1f}M parameters and random weights, rows of {tokens} tokens, AdamW, one"
            " process."
        ),
        "",
        "| | checkpointing | rows per step | K | " + " | ".join(ITEMS.values()) + " | together |",
        "|---" * (len(ITEMS) + 5) + "|",
    ]
    for case in document["memory"]:
        sizes = " | ".join(f"{case['bytes'][key] / MIB:,.1f}" for key in ITEMS)
        lines.append(
            f"| {case['name']} | {'yes' if case['checkpointing'] else 'no'} | {case['rows_per_step']} | {case['K']} |"
            f" {sizes} | {case['bytes']['Total'] / MIB:,.1f} |"
        )
    lines += [
        "",
        "![Memory by item](accumulation_memory.svg)",
        "",
        "## Gradient error against one batch",
        "",
        (
            "Relative L2; a Llama with 1.6M parameters, K = 8 micro-batches of 2 rows; five windows of rows each,"
            " median (smallest to largest)."
        ),
        "",
        "| spread of trained tokens per row | mean of means | window denominator |",
        "|---|---|---|",
    ]
    for case in document["raggedness"]:
        cells = [
            f"{statistics.median(case[n]):.1e} ({min(case[n]):.1e} to {max(case[n]):.1e})"
            for n in ("mean of means", "window denominator")
        ]
        lines.append(f"| {case['spread']:g} | {cells[0]} | {cells[1]} |")
    chats = document["chats"]
    real = chats["mean of means"]
    lines += [
        "",
        (
            f"On the quick start's own chats (spread {chats['spread']:.2f}, K = {chats['K']} micro-batches of 4 rows,"
            f" its untrained model, {len(real)} windows) the mean of means is off by {min(real):.1%} to"
            f" {max(real):.1%}, median {statistics.median(real):.1%}."
        ),
        "",
        "![Error against raggedness](accumulation_error.svg)",
        "",
        "## Loops that are wrong even for even rows",
        "",
        "| K = 4, rows of equal length | gradient error |",
        "|---|---|",
    ]
    lines += [f"| {name} | {error:.0%} |" for name, error in document["loops"].items()]
    lines += [
        "",
        "## Trained tokens per second by K",
        "",
        (
            "The 19.5M-parameter Llama, one thread per rank, micro-batches of one row of 256 tokens, the launch files"
            " `cpu`, `cpu_2_ranks` and `zero3_offload_cpu_2_ranks`; median of three windows. Without a GPU host and"
            " device are one memory: the direction shows, the size of the effect does not."
        ),
        "",
        "| K | " + " | ".join(f"{name} | over K = 1" for name in document["time"]) + " |",
        "|---" * (1 + 2 * len(document["time"])) + "|",
    ]
    for row in zip(*document["time"].values(), strict=True):
        cells = [
            f"{case['tokens_per_second']:,.0f} | {case['tokens_per_second'] / cases[0]['tokens_per_second']:.2f}"
            for case, cases in zip(row, document["time"].values(), strict=True)
        ]
        lines.append(f"| {row[0]['K']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Throughput by K](accumulation_throughput.svg)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    folder = parser.parse_args().folder
    document = json.loads((folder / "accumulation.json").read_text())
    style()
    draw_memory(document["memory"], folder / "accumulation_memory.svg")
    draw_raggedness(document["raggedness"], document["chats"], folder / "accumulation_error.svg")
    draw_throughput(document["time"], folder / "accumulation_throughput.svg")
    (folder / "accumulation.md").write_text(tables(document))
    print(f"wrote {folder / 'accumulation.md'}")


if __name__ == "__main__":
    main()
