"""Writes docs/memory.md: what `finetune plan` says of models of 0.6, 8, 70 and 175 billion parameters, and what that
rests on.

    python -m scripts.docs.memory_page            writes it (a minute, no GPU, nothing is downloaded)
    python -m scripts.docs.memory_page --check    exits 1 where it is out of date

The configs in scripts/docs/model_configs/ are made by hand from the published numbers of the architectures, so that
nothing need be downloaded; recipes/gpt3-175b/model is another. No figure is measured: the page says so."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from finetune.commands.plan import planned
from finetune.report.text import human_bytes, human_seconds

ROOT = Path(__file__).resolve().parents[2]

PAGE = ROOT / "docs" / "memory.md"
TEXT = ROOT / "scripts" / "docs" / "memory_page.md"  # the prose; {tables} is where the tables go
GIB = 2**30
COLUMNS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer states": "optimizer",
    "activations": "activations",
    "logits and loss": "logits, loss",
    "buffers": "buffers",
    "overhead": "overhead",
}


@dataclass(frozen=True)
class Model:
    """A table: a recipe, the folder of its model's config (None: the recipe's own), and the machine."""

    title: str
    recipe: str
    config: str | None
    device: str
    host: str | None = None
    launch: str | None = None


MODELS = (
    Model("Qwen3-0.6B, one GPU of 24 GiB", "recipes/qwen3-0.6b/full.yaml", "qwen3-0.6b", "24GiB", "64GiB"),
    Model("Llama-3.1-8B, one GPU of 80 GiB", "recipes/llama3.1-8b/full.yaml", "llama3.1-8b", "80GiB", "512GiB"),
    Model(
        "Llama-3.1-70B, two machines of 8 GPUs of 80 GiB",
        "recipes/llama3.1-70b/lora.yaml",
        "llama3.1-70b",
        "80GiB",
        "2TiB",
        "accelerate_configs/multi_node_zero3_offload.yaml",
    ),
    Model("175 billion parameters, one GPU of 40 GiB", "recipes/gpt3-175b/sft.yaml", None, "40GiB"),
)


def page() -> str:
    """docs/memory.md."""
    text = TEXT.read_text(encoding="utf-8")
    return (
        "<!-- Written by scripts/docs/memory_page.py from scripts/docs/memory_page.md; edit there. -->\n"
        + text.replace("{tables}", "\n".join(section(model) for model in MODELS).rstrip())
    )


def section(model: Model) -> str:
    """One model: the command, the table, the verdict, what would fit, what offload moves."""
    overrides = (
        [f"model.name_or_path={ROOT / 'scripts' / 'docs' / 'model_configs' / model.config}"] if model.config else []
    )
    found = planned(
        str(ROOT / model.recipe), overrides, model.launch and str(ROOT / model.launch), model.device, model.host, None
    )
    shown = [
        "finetune",
        "plan",
        model.recipe,
        *([f"model.name_or_path=scripts/docs/model_configs/{model.config}"] if model.config else []),
        *(["--launch", model.launch] if model.launch else []),
        "--device-memory",
        model.device,
        *(["--host-memory", model.host] if model.host else []),
    ]
    batch, launch = found["batch"], found["launch"]
    lines = [
        f"### {model.title}",
        "",
        "```bash",
        " ".join(shown),
        "```",
        "",
        (
            f"{found['model']['parameters']:,} parameters; {batch['global_batch_rows']} rows of"
            f" {found['model']['longest_row_tokens']:,} tokens per optimizer step over {launch['ranks']}"
            f" rank{'s' * (launch['ranks'] > 1)}, bf16. GiB:"
        ),
        "",
    ]
    names = ["strategy", "rows x K", *COLUMNS.values(), "**device**", "host", "NVMe", "checkpoints", "peak at", "fits"]
    lines += [f"| {' | '.join(names)} |", "|---|---" + "|--:" * (len(names) - 4) + "|---|---|"]
    lines += [_row(one) for one in (found["as_it_stands"], *found["strategies"])]
    return "\n".join([*lines, "", *_verdict(found), *_offload(found), ""])


def _row(one: dict) -> str:
    if one["refused"]:
        return f"| {one['name']} | not possible: {one['refused']} |" + " |" * 13
    numbers = [
        *(one["items"][item] for item in COLUMNS),
        one["device"]["expected"],
        one["host_total"]["expected"],
        one["nvme_total"],
        one["disk"],
    ]
    cells = [_gib(size) for size in numbers]
    cells[len(COLUMNS)] = f"**{cells[len(COLUMNS)]}**"
    batch = f"{one['micro_batch_rows']} x {one['accumulation_steps']}"
    return f"| {' | '.join([one['name'], batch, *cells, one['peak'], one['verdict']])} |"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size else "-"


def _verdict(found: dict) -> list[str]:
    stands = found["as_it_stands"]
    three = " / ".join(human_bytes(stands["device"][name]) for name in ("low", "expected", "high"))
    host = human_bytes(stands["host_total"]["expected"])
    lines = [
        f"As configured: **{found['verdict']}** (device, low / expected / high: {three}; host {host} per machine)."
    ]
    change = found["change"]
    if change:
        lines.append(
            f"The cheapest change that makes it fit: {change['name']}, {change['micro_batch_rows']} rows x"
            f" K={change['accumulation_steps']}, `{change['launch_file']}`: device"
            f" {human_bytes(change['device']['expected'])}, host {human_bytes(change['host_total']['expected'])}."
        )
    elif found["nearest"]:
        near = found["nearest"]
        lines.append(
            f"None of the known changes makes it fit; nearest is {near['name']}, by"
            f" {human_bytes(near['over_device_bytes'])} on the device and {human_bytes(near['over_host_bytes'])} on the"
            " host."
        )
    return [*lines, "", *(f"{text}\n" for text in found["impossible"])]


def _offload(found: dict) -> list[str]:
    lines = [
        "| offload, arithmetic | once per step | per micro-batch | links busy per micro-batch | a step |",
        "|---|---|---|---|---|",
    ]
    for one in found["offload"]:
        if one["name"].endswith(", K=1"):
            continue
        busy = ", ".join(
            f"K={at['accumulation_steps']}: {human_seconds(at['seconds_per_micro_batch'])}" for at in one["at"]
        )
        own = next(at for at in one["at"] if at["accumulation_steps"] == one["accumulation_steps"])
        lines.append(
            f"| {one['name'].removesuffix(', K>1')} | {_moved(one['step'])} | {_moved(one['micro_batch'])} | {busy} |"
            f" K={own['accumulation_steps']}: {human_seconds(own['pcie_seconds'] + own['nvme_seconds'])} |"
        )
    return lines


def _moved(sizes: dict) -> str:
    pcie, nvme = sizes["to_device_bytes"] + sizes["to_host_bytes"], sizes["nvme_read_bytes"] + sizes["nvme_write_bytes"]
    return f"PCIe {human_bytes(pcie)}" + (f", NVMe {human_bytes(nvme)}" if nvme else "")


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(
            f"docs/memory.md is {'up to date' if same else 'out of date; run python -m scripts.docs.memory_page'}",
            file=sys.stderr,
        )
        sys.exit(not same)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
