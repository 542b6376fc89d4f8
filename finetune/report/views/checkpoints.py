"""The terminal view of `finetune checkpoints`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.report.text import count, human_bytes, human_seconds

COLUMNS = {
    "step": "step",
    "window": "window",
    "epoch": "epoch",
    "rows": "rows",
    "tokens": "total_tokens",
    "loss": "train_loss",
    "held out": "eval_loss",
    "size": "bytes",
    "age": "age_seconds",
}
LEFT_OUT = ("window", "epoch", "loss")  # where the terminal is narrow
NARROW, PIPE = 100, 160  # columns


def show(document: Mapping, console: Console | None = None) -> None:
    """Print the document of `finetune.checkpoint.survey.survey`: a line per checkpoint, then what a resume would
    take.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE
    entries = document["checkpoints"]
    if not entries:
        console.print(Text(f"{document['run']}: no checkpoint yet"), soft_wrap=True)
        return
    writers = {_writer(entry) for entry in entries if entry["engine"] is not None}
    total = human_bytes(sum(entry["bytes"] or 0 for entry in entries))
    by = f", written by {next(iter(writers))}" if len(writers) == 1 else ""
    console.print(
        Text(f"{document['run']}: {len(entries)} checkpoint{'s' if len(entries) > 1 else ''}, {total}{by}"),
        soft_wrap=True,
    )
    console.print(_table(entries, document, len(writers) > 1, console.width < NARROW))
    console.print(
        Text(_verdict(document), style="" if document["resume_from"] is not None else "bold red"), soft_wrap=True
    )


def _table(entries: list, document: Mapping, writers: bool, narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = {name: key for name, key in COLUMNS.items() if not (narrow and name in LEFT_OUT)}
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ["written by"] * writers + [""]:
        table.add_column(name)
    best = min((e["eval_loss"] for e in entries if e["eval_loss"] is not None), default=None)
    for entry in entries:
        cells = [_cell(key, entry[key]) for key in columns.values()] + [_writer(entry)] * writers
        table.add_row(*cells, _marks(entry, document, best))
    return table


def _cell(key: str, value: float | None) -> str:
    """A figure as people read it; `-` for what is not known."""
    if value is None:
        return "-"
    words = {
        "bytes": human_bytes,
        "age_seconds": human_seconds,
        "train_loss": "{:.4f}".format,
        "eval_loss": "{:.4f}".format,
    }
    return words.get(key, "{:,}".format)(value)


def _writer(entry: Mapping) -> str:
    if entry["engine"] is None:
        return "-"
    several = count(entry["ranks"], "rank")
    plain = "one process" if entry["ranks"] == 1 else f"DDP, {several}"
    engine = f"ZeRO-{entry['zero_stage']}, {several}" if entry["engine"] == "DeepSpeed" else plain
    precision = {"no": "no mixed precision"}.get(entry["mixed_precision"], entry["mixed_precision"])
    return f"{engine}, {precision}"


def _marks(entry: Mapping, document: Mapping, best: float | None) -> Text:
    if entry["problems"]:
        return Text("damaged", style="bold red")
    marks = ["latest"] * (entry["name"] == document["latest"]) + ["resume"] * (entry["step"] == document["resume_from"])
    marks += ["best"] * (best is not None and entry["eval_loss"] == best)
    return Text(", ".join(marks), style="green")


def _verdict(document: Mapping) -> str:
    how = (
        "every byte was read and is as it was saved"
        if document["checked"] == "hashes"
        else ("manifests and lengths are right; --verify reads every byte")
    )
    if document["resume_from"] is None:
        return "none is whole: a resume would refuse to start"
    return f"a resume takes step {document['resume_from']:,} ({how})"
