"""The terminal view of `finetune data`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune.report.text import count

TRAINED, CONTEXT = "green", "dim"
_STYLES = {  # (trained, special token)
    (True, False): TRAINED,
    (True, True): f"bold {TRAINED}",
    (False, False): CONTEXT,
    (False, True): f"italic {CONTEXT}",
}
_BAR_COLUMNS = 40
_LONGEST_PIECE = 1200  # characters of one piece; the middle of longer ones is left out
_BLOCKS = " ▏▎▍▌▋▊▉"


def show(document: Mapping, console: Console | None = None) -> None:
    """Print the report of `finetune.commands.data_document.examine`: sample rows, figures, lengths, what to mend.

    Where the terminal has no colours, trained text stands between ⟦ and ⟧.
    """
    console = console or Console(highlight=False)
    coloured = console.color_system is not None
    for sample in document["samples"]:
        console.print(_sample_title(sample, document["train"]["rows"]))
        console.print(Padding(_sample_text(sample, coloured), (0, 0, 1, 2), expand=False))
    if document["samples"]:
        console.print(_legend(coloured))
        console.print()
    if document["train"]:
        console.print(_figures(document))
        console.print()
        console.print(_histogram(document["train"]["lengths"]))
        console.print()
    console.print(_verdict(document))


def _sample_title(sample: Mapping, rows: int) -> Text:
    share = sample["trained"] / sample["tokens"]
    return Text.assemble(
        (f"row {sample['row'] + 1:,} of {rows:,}", "bold"),
        f"  {sample['tokens']:,} tokens, {sample['trained']:,} trained ({share:.0%})",
    )


def _sample_text(sample: Mapping, coloured: bool) -> Text:
    text = Text()
    inside = False
    pieces = list(sample["pieces"])
    if pieces and not pieces[-1][0].strip("\n"):
        pieces[-1] = ["↵" * len(pieces[-1][0]), *pieces[-1][1:]]  # no blank line after the row
    for piece, trained, special in pieces:
        if not coloured and trained != inside:
            text.append("⟦" if trained else "⟧")
        inside = trained
        if len(piece) > _LONGEST_PIECE:
            left_out = len(piece) - _LONGEST_PIECE
            half = _LONGEST_PIECE // 2
            piece = f"{piece[:half]} … {left_out:,} characters … {piece[-half:]}"
        # an end of line is a token too: shown, and coloured like the others
        text.append(piece.replace("\n", "↵\n"), _STYLES[trained, special])
    return text.append("⟧" if inside and not coloured else "")


def _legend(coloured: bool) -> Text:
    if coloured:
        special = ("special token", f"bold {TRAINED}")
        return Text.assemble("  ", ("trained", TRAINED), "  ", ("not trained", CONTEXT), "  ", special)
    return Text("  ⟦trained⟧  not trained")


def _figures(document: Mapping) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", justify="right")
    train, evaluation = document["train"], document["evaluation"]
    stored = sum(source["rows"] for source in document["sources"])
    for source in document["sources"]:
        weight = f", weight {source['weight']:g}" if source["weight"] != 1 else ""
        table.add_row("source", f"{source['name']}: {source['rows']:,} rows of {source['format']}{weight}")
    table.add_row("rows", f"{train['rows']:,}, made of {train['source_rows']:,} in the sources")
    share = train["trained_tokens"] / train["tokens"]
    table.add_row("tokens", f"{train['tokens']:,}, {train['trained_tokens']:,} of them trained ({share:.0%})")
    if train["turns"]:
        ends = f"{train['ends']:,} ({train['ends'] / train['turns']:.1%})"
        table.add_row("turns", f"{train['turns']:,}, the end trained in {ends}")
    table.add_row("truncated", _count(train["truncated"], stored, f"at data.max_length {document['max_length']:,}"))
    table.add_row("duplicates", _count(train["duplicates"], stored))
    table.add_row("double BOS", _count(train["double_bos"], stored))
    table.add_row("dropped", _count(train["dropped"], train["source_rows"]))
    for reason, entry in sorted(train["reasons"].items(), key=lambda item: -item[1]["rows"]):
        table.add_row("", f"{entry['rows']:,} because {reason} (first: {entry['example']})")
    if evaluation:
        shared = f", {evaluation['also_in_train']:,} of them also in training" if evaluation["also_in_train"] else ""
        counts = f"{evaluation['rows']:,} rows, {evaluation['trained_tokens']:,} trained tokens"
        table.add_row("held out", counts + shared)
    return table


def _count(rows: int, of_rows: int, note: str = "") -> str:
    if not rows:
        return "none"
    return f"{count(rows, 'row')} ({rows / max(of_rows, 1):.1%})" + (f" {note}" if note else "")


def _histogram(lengths: Mapping) -> Group:
    most = max(rows for _, _, rows in lengths["histogram"])
    widest = len(f"{lengths['histogram'][-1][1]:,}")
    lines = [
        Text.assemble(
            ("tokens per row", "bold"),
            f"  median {lengths['median']:,}, 90 % up to {lengths['p90']:,}, longest {lengths['max']:,}",
        )
    ]
    for start, end, rows in lengths["histogram"]:
        eighths = round(rows / most * _BAR_COLUMNS * 8)
        eighths = max(eighths, 1) if rows else 0
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        lines.append(
            Text.assemble(f"  {start:>{widest},} - {end:>{widest},} ", (bar, "blue"), f" {rows:,}" if rows else "")
        )
    return Group(*lines)


def _verdict(document: Mapping) -> Group:
    lines = [Text.assemble(("note     ", "cyan"), note) for note in document["notes"]]
    lines += [Text.assemble(("warning  ", "yellow"), warning) for warning in document["warnings"]]
    lines += [Text.assemble(("wrong    ", "bold red"), problem) for problem in document["problems"]]
    if not document["problems"]:
        lines.append(Text.assemble(("ok       ", "green"), "nothing here would make training wrong"))
    return Group(*lines)
