"""The page of scripts/benchmarks/gpu_suite/run.py: Markdown from the document that becomes its JSON, and nothing
else.
"""

from __future__ import annotations

from scripts.benchmarks.gpu_suite.memory import overheads

GIB, MIB = 2**30, 2**20


def with_overheads(document: dict) -> dict:
    """The document with the fitted overheads and the machine, which its cases hold."""
    found = {row["name"]: row["figures"] for row in done(document, "memory")}
    machine = next((row["figures"] for row in done(document, "prepare") if row["name"] == "prepare models"), {})
    return document | {"machine": machine, "overheads": overheads(found)}


def done(document: dict, group: str) -> list[dict]:
    """Rows of a group that have figures."""
    return [row for row in document["cases"] if row["group"] == group and row["status"] == "done"]


def beyond(rows: list[dict]) -> list[str]:
    """The figures that miss their limit, in words."""
    document, found = {"cases": rows}, []
    for row in done(document, "exactness"):
        found += [
            f"{row['name']}, {f['what']}: {f['value']:.2g}"
            for f in row["figures"]
            if not within(f["value"], f["limit"])
        ]
    for row in done(document, "memory"):
        error, limit = row["figures"]["device_error"], row["figures"]["limit"]
        if error is not None and not within(abs(error), limit):
            found.append(f"{row['name']}, predicted device peak: {error:+.1%}")
    for row in done(document, "throughput"):
        least = row["figures"]["least_over_first"]
        second = row["figures"]["windows"][1]
        if least is not None and second["over_first"] < least:
            found.append(f"{row['name']}, K = {second['K']} over K = 1: {second['over_first']:.2f}")
    return found


def within(value: float, limit: float | None) -> bool:
    """Whether a figure keeps its limit; NaN keeps none."""
    return limit is None or value <= limit


def table(head: list[str], rows: list[list]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def size(number: int | None, unit: int) -> str:
    """Bytes in this unit; unknown ones as such."""
    return "unknown" if number is None else f"{number / unit:,.2f}" if unit == GIB else f"{number / unit:,.1f}"


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:+.1%}"


def page(document: dict) -> str:
    """docs/benchmarks/gpu_suite.md."""
    parts = [head(document), "## Cases\n\n" + cases(document)]
    for group, title, write in (
        ("memory", "Memory", memory),
        ("exactness", "Exactness", exactness),
        ("throughput", "Throughput", throughput),
    ):
        if done(document, group):
            parts.append(f"## {title}\n\n" + write(document))
    failed = [row for row in document["cases"] if row["output"]]
    if failed:
        parts.append("## What failed cases said last")
        parts += [f"{row['name']}: {row['why']}\n\n```\n" + "\n".join(row["output"]) + "\n```" for row in failed]
    return "\n\n".join(parts) + "\n"


def head(document: dict) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    device = machine.get("device", "unknown")
    said = [
        f"{machine[key]} {what}" if key == "cores" else f"{what} {machine[key]}"
        for key, what in (("driver", "driver"), ("cores", "cores"))
        if machine.get(key)
    ]
    small = (
        "\nTiny models on a CPU: this page shows that the suite works, its figures are no benchmark."
        if document["small"]
        else ""
    )
    switches = ", ".join(f"{name}={value}" for name, value in document["environment"].items())
    return f"""\
# GPU suite

Written by `{document["command"]}` on {document["date"]}, commit {document["commit"]}.
{", ".join([device, *said])}; {versions}.
With {switches}; torch's allow_tf32 for matrix products: {machine.get("allow_tf32", "unknown")}.{small}"""


def cases(document: dict) -> str:
    rows = [[row["name"], row["status"], f"{row['seconds']:.0f}", row["why"]] for row in document["cases"]]
    return table(["case", "status", "seconds", "why"], rows)


def memory(document: dict) -> str:
    unit = MIB if document["small"] else GIB
    name = "MiB" if document["small"] else "GiB"
    columns = (
        "device_allocated_bytes",
        "device_reserved_bytes",
        "device_used_bytes",
        "predicted_device_bytes",
        "device_error",
        "tracked_bytes",
        "predicted_tracked_bytes",
        "tracked_error",
        "host_resident_bytes",
        "predicted_host_bytes",
        "host_error",
    )
    rows, notes = [], []
    for row in done(document, "memory"):
        found = row["figures"]
        cells = [percent(found[c]) if c.endswith("error") else size(found[c], unit) for c in columns]
        rows.append(
            [
                row["name"].removeprefix("memory: "),
                f"{found['parameters'] / 1e6:,.1f}M",
                *cells,
                found["peak"] or "unknown",
            ]
        )
        notes += [found["note"]] * bool(found["note"])
    text = table(
        [
            "case",
            "parameters",
            f"device: allocated, {name}",
            "reserved",
            "in use",
            "predicted",
            "error",
            "tracked tensors",
            "predicted",
            "error",
            "host: resident",
            "predicted",
            "error",
            "what sets the peak",
        ],
        rows,
    )
    text = (
        f"Peaks of the real trainer in {name}; errors are predicted / measured - 1. Tracked tensors, on a CPU, stand"
        ' for a device\'s. "In use" is what the device itself reports over what it had before.\n\n' + text
    )
    fits = [
        [
            o["name"],
            size(o["constant_bytes"], MIB),
            len(o["fitted_on"]),
            "; ".join(
                f"{case.removeprefix('memory: ')} {value / MIB:+,.1f}" for case, value in o["residual_bytes"].items()
            )
            or "-",
        ]
        for o in document["overheads"]
    ]
    text += (
        "\n\n### Overheads\n\nOne constant each, the median over every other case, and how far the other half is from"
        " it; MiB.\n\n" + table(["what", "constant", "fitted on cases", "residuals of the rest"], fits)
    )
    return text + "".join(f"\n\n{note}." for note in dict.fromkeys(notes))


def exactness(document: dict) -> str:
    rows = [
        [
            row["name"].removeprefix("exactness: "),
            f["what"],
            f"{f['value']:.2g}",
            "reported" if f["limit"] is None else f"{f['limit']:.1e}" if f["limit"] else "0",
            "yes" if within(f["value"], f["limit"]) else "NO",
        ]
        for row in done(document, "exactness")
        for f in row["figures"]
    ]
    return "Relative L2 differences, the worst of all windows, or counts.\n\n" + table(
        ["case", "figure", "value", "limit", "kept"], rows
    )


def throughput(document: dict) -> str:
    rows = []
    for row in done(document, "throughput"):
        found = row["figures"]
        for window in found["windows"]:
            mfu = "unknown" if window["mfu"] is None else f"{window['mfu']:.1%}"
            rows.append(
                [
                    row["name"].removeprefix("throughput: "),
                    window["K"],
                    f"{window['window_seconds']:.3f}",
                    f"{window['tokens_per_second']:,.0f}",
                    f"{window['over_first']:.2f}",
                    mfu,
                ]
            )
    peak = (
        f"{found['peak_flops'] / 1e12:,.0f} TFLOP/s in dense bf16" if found["peak_flops"] else "unknown for this device"
    )
    return (
        f"A Llama with {found['parameters'] / 1e6:,.1f}M parameters, micro-batches of {found['micro_batch'][0]} rows of"
        f" {found['micro_batch'][1]} tokens without checkpointing, AdamW; median of two windows. MFU = tokens/s x (6 N"
        " + 12 L H Q T) / peak: N parameters, L layers, H heads of size Q, rows of T tokens (PaLM, arXiv 2204.02311,"
        f" appendix B); peak {peak}.\n\n"
        + table(["engine", "K", "seconds per window", "tokens/s", "over K = 1", "MFU"], rows)
    )
