"""The terminal view of `finetune plan`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.report.text import count, human_bytes, human_seconds

GIB = 2**30
WIDEST = 140  # columns
WORDS = {"fits": "fits", "probably": "probably fits", "probably not": "probably does not fit", "no": "does not fit"}
STYLES = {"fits": "green", "probably": "yellow", "probably not": "red", "no": "red"}
SHORT = {
    "parameters": "para-\nmeters",
    "gradients": "gra-\ndients",
    "optimizer states": "optim.\nstates",
    "activations": "acti-\nvations",
    "logits and loss": "logits,\nloss",
    "buffers": "buf-\nfers",
    "overhead": "over-\nhead",
}


def show(document: Mapping, console: Console | None = None) -> None:
    """Print the document of `finetune.commands.plan.planned`."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDEST) if console.is_terminal else WIDEST
    console.print(_head(document), soft_wrap=True)
    console.print(_table(document))
    for block in (
        Text("\n".join(_legend(document))),
        _stands(document),
        _changes(document),
        _impossible(document),
        _offload(document),
        _notes(document),
    ):
        if block:
            console.print(block, "", soft_wrap=True, sep="\n")


def _head(document: Mapping) -> Text:
    model, batch, launch, memory = (document[key] for key in ("model", "batch", "launch", "memory"))
    share = model["trained_parameters"] / model["parameters"]
    ranks = count(launch["ranks"], "rank")
    numbers = {"no": "float32"}.get(launch["mixed_precision"], launch["mixed_precision"])
    there = {
        "device": _limit(memory["device_bytes"], memory["device_source"]),
        "host": _limit(memory["host_bytes"], memory["host_source"]),
    }
    return Text(
        "\n".join(
            [
                f"{document['recipe']}",
                (
                    f"  model   {model['name']} ({model['architecture']}), {model['parameters']:,} parameters,"
                    f" {share:.1%} of them trained"
                ),
                (
                    f"  batch   {batch['global_batch_rows']} rows of at most {model['longest_row_tokens']:,} tokens per"
                    f" optimizer step{_layout(batch, ranks)}"
                ),
                f"  launch  {launch['source']}, {ranks}, {numbers}",
                f"  memory  device: {there['device']}; host: {there['host']}",
                "",
            ]
        )
    )


def _limit(size: float | None, source: str) -> str:
    return f"unknown ({source})" if size is None else f"{human_bytes(size)} ({source})"


def _table(document: Mapping) -> Table:
    rows = [document["as_it_stands"], *document["strategies"]]
    judged = document["memory"]["device_bytes"] is not None or document["memory"]["host_bytes"] is not None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("GiB", no_wrap=True)
    for name in ("rows\nx K", *SHORT.values(), "on the\ndevice", "on the\nhost", "\nNVMe", "check-\npoints"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak at", no_wrap=True)
    if judged:
        table.add_column("fits", no_wrap=True)
    for row in rows:
        name = Text(row["name"], style="bold" if row is rows[0] else "")
        if row["refused"]:
            table.add_row(name, *["-"] * 12)
            continue
        numbers = [row["items"][item] for item in SHORT]
        numbers += [row["device"]["expected"], row["host_total"]["expected"], row["nvme_total"], row["disk"]]
        table.add_row(
            name,
            f"{row['micro_batch_rows']} x {row['accumulation_steps']}",
            *map(_gib, numbers),
            row["peak"],
            *([Text(row["verdict"], style=STYLES.get(row["verdict"], ""))] * judged),
        )
    return table


def _gib(size: float) -> str:
    count = size / GIB
    return "-" if not size else f"{count:,.0f}" if count >= 999.5 else f"{count:.1f}" if count >= 0.05 else "0.0"


def _legend(document: Mapping) -> list[str]:
    by_name = {row["name"]: row for row in document["strategies"]}
    lines = [f"{row['name']} is not possible: {row['refused']}" for row in document["strategies"] if row["refused"]]
    adapters = document["launch"]["machines"]
    lines += [
        "Items: on one device at its peak. Host and NVMe: all ranks of a machine"
        + (f" (of {adapters})" if adapters > 1 else "")
        + ". Checkpoints: those kept, the next one and the model, over all ranks.",
        (
            'Every weight is trained until LoRA; from "+ checkpointing" on activations are recomputed and K > 1, unless'
            " K=1 is said."
        ),
    ]
    whole, one, many = (by_name[name] for name in ("whole batch, K=1", "same micro-batch, K=1", "accumulation, K>1"))
    if not any(row["refused"] for row in (whole, one, many)):
        more, less = many["step_bytes"] - one["step_bytes"], whole["step_bytes"] - many["step_bytes"]
        lines.append(
            f"Accumulation does not remove gradients: at the same micro-batch K > 1 takes {human_bytes(more)} more than"
            " K=1 in a step, one gradient copy at most, whatever K is."
        )
        if less > 0:
            lines.append(
                f"What it saves, {human_bytes(less)} against the whole batch at once, is the smaller micro-batch:"
                f" {count(many['micro_batch_rows'], 'row')} instead of"
                f" {whole['micro_batch_rows']}."
            )
    return lines


def _layout(batch: Mapping, ranks: str) -> str:
    """How a step's rows become micro-batches; packed, rows are planned for at their full length."""
    rows, steps = batch["per_device_rows"], batch["accumulation_steps"]
    if batch["row_tokens"] is None:
        return f" = {rows} per micro-batch x K={steps} x {ranks}"
    return f" on {ranks}, packed; planned with full rows: {rows} per micro-batch, K={steps} at most"


def _stands(document: Mapping) -> Text:
    row, word = document["as_it_stands"], document["verdict"]
    device, host = row["device"], row["host_total"]
    need = f"device {_three(device)}" if row["parts"]["device"] else f"tensors {_three(device)}"
    verdict = WORDS.get(word) or "unknown whether it fits; give --device-memory"
    head = Text(f"As configured: {verdict}", style=f"bold {STYLES.get(word, '')}".strip())
    per = "" if host == row["host"] else " for all ranks of a machine"
    lines = [f"\n  low / expected / high: {need}; host {_three(host)}{per}"]
    if row["micro_batch_rows"] and document["batch"]["open"]:
        lines.append(f"\n  micro-batch auto: {row['micro_batch_rows']} rows x K={row['accumulation_steps']}")
    memory = document["memory"]
    if memory["host_bytes"] is None and word != "unknown":
        lines.append("\n  this is the device's answer: the host is not judged without --host-memory")
    return head.append(Text("".join(lines), style="not bold default"))


def _product(batch: Mapping, rows: int, steps: int, ranks: int) -> str:
    if batch["row_tokens"] is not None:
        tokens, step = count(rows * batch["row_tokens"], "token"), count(batch["global_batch_rows"], "row")
        return f"packed micro-batches of at most {tokens}, {step} per step as before"
    product = f"{count(rows, 'row')} x K={steps} x {count(ranks, 'rank')} = {rows * steps * ranks}"
    return f"{product} rows per step, as before ({batch['global_batch_rows']})"


def _three(need: Mapping) -> str:
    return " / ".join(human_bytes(need[name]) for name in ("low", "expected", "high"))


def _changes(document: Mapping) -> Text | None:
    if document["fits"] is not False:
        return None
    change, batch = document["change"], document["batch"]
    failed = [f"  {row['name']}: {_miss(row)}" for row in document["rungs"] if not row["fits"]]
    if change is None:
        nearest = document["nearest"]
        lines = ["None of the known changes makes it fit.", *failed]
        if nearest:
            lines.append(
                f"Nearest: {nearest['name']} with {count(nearest['micro_batch_rows'], 'row')}: {_miss(nearest)}."
            )
        return Text("\n".join(lines))
    rows, steps, ranks = change["micro_batch_rows"], change["accumulation_steps"], document["launch"]["ranks"]
    need = f"device {human_bytes(change['device']['expected'])}, host {human_bytes(change['host_total']['expected'])}"
    kept = "the mathematics stays the same"
    if change["changes_mathematics"]:
        kept = "this changes the mathematics: other weights are trained, with a learning rate of their own"
    paper = " on paper (arithmetic, not measured)" if document["impossible"] else ""
    lines = [
        f"The cheapest change that makes it fit{paper}: {change['name']} ({need}; {WORDS[change['verdict']]})",
        f"  {_product(batch, rows, steps, ranks)}; {kept}",
    ]
    if change["recipe_lines"]:
        lines += ["  recipe:", *(f"    {line}" for line in change["recipe_lines"])]
    lines.append(f"  launch file: {change['launch_file']}" + (", with" if change["launch_lines"] else ", as it is"))
    lines += [f"    {line}" for line in change["launch_lines"]]
    lines.append(f"  or: {change['command']}")
    if document["memory"]["host_bytes"] is None and change["offload_optimizer"] != "none":
        host = human_bytes(change["host_total"]["expected"])
        lines.append(f"  if each machine has {host} of host memory: --host-memory has that judged, too")
    if failed:
        lines += ["Tried before:", *failed]
    return Text("\n".join(lines))


def _miss(row: Mapping) -> str:
    if row["refused"]:
        return f"not possible: {row['refused']}"
    places = {"device": "over_device_bytes", "host": "over_host_bytes"}
    over = [f"{human_bytes(row[key])} too much on the {place}" for place, key in places.items() if row[key]]
    return " and ".join(over)


def _impossible(document: Mapping) -> Text | None:
    if not document["impossible"]:
        return None
    lines = ["Impossible on the device alone (arithmetic)"]
    return Text("\n".join([*lines, *(line for text in document["impossible"] for line in _wrapped(text))]))


def _offload(document: Mapping) -> Text | None:
    if not document["offload"]:
        return None
    links = document["links"]
    lines = [
        "Offload, per rank and optimizer step. Arithmetic, not measured: PCIe at"
        f" {links['pcie_bytes_per_second'] / 1e9:g} GB/s, one NVMe disk at {links['nvme_bytes_per_second'] / 1e9:g}"
        " GB/s, nothing overlapping; computing comes on top."
    ]
    seen = set()
    for entry in document["offload"]:
        key = (str(entry["micro_batch"]), str(entry["step"]))
        if key in seen or entry["name"].endswith(", K=1"):
            continue
        seen.add(key)
        once, each = (_moved(entry[part]) for part in ("step", "micro_batch"))
        lines.append(f"  {entry['name'].removesuffix(', K>1')}: once per step {once}; per micro-batch {each}")
        busy = ", ".join(
            f"K={at['accumulation_steps']} {human_seconds(at['seconds_per_micro_batch'])}" for at in entry["at"]
        )
        own = next(at for at in entry["at"] if at["accumulation_steps"] == entry["accumulation_steps"])
        whole = human_seconds(own["pcie_seconds"] + own["nvme_seconds"])
        lines.append(f"    links busy per micro-batch: {busy}; a step of K={entry['accumulation_steps']}: {whole}")
    return Text("\n".join(lines))


def _moved(sizes: Mapping) -> str:
    pcie = sizes["to_device_bytes"] + sizes["to_host_bytes"]
    nvme = sizes["nvme_read_bytes"] + sizes["nvme_write_bytes"]
    return " and ".join(
        [f"{human_bytes(size)} over {name}" for name, size in (("PCIe", pcie), ("NVMe", nvme)) if size] or ["nothing"]
    )


def _notes(document: Mapping) -> Text:
    notes: Sequence[str] = document["notes"]
    if not document["model"]["traced"]:
        notes = [
            (
                f"{document['model']['architecture']} cannot be traced: activations and losses are by formula, a wide"
                " guess"
            ),
            *notes,
        ]
    notes = [*notes, "no figure here has been measured on a GPU yet (docs/memory.md)"]
    return Text("\n".join(f"note: {note}" for note in notes))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDEST - 2, initial_indent="  ", subsequent_indent="  ")
