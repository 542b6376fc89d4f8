"""Predicted beside measured: for run.json, the lines a run begins and ends with, and the refusal of what cannot fit."""

from __future__ import annotations

import dataclasses

from finetune.engine.devices import device_limit_bytes, has_accelerator
from finetune.engine.meter import Meter
from finetune.errors import UserError
from finetune.memory.estimate import Estimate
from finetune.memory.trace import Shape
from finetune.recipe.load import Loaded
from finetune.report.text import human_bytes

# What a trainer's process takes from the forecast to its steps beside tensors: libraries that are imported by then,
# kernels' own memory. Medians of docs/benchmarks/memory.md's runs without it, on Linux and the CPU; a GPU's driver
# takes more, unmeasured.
LATER_BYTES = {"single": 45 * 2**20, "ddp": 50 * 2**20, "deepspeed": 110 * 2**20}


def predicted(found: Estimate, shape: Shape, engine: str, process_bytes: int) -> dict:
    """The estimate for run.json; bytes of one rank (disk: of all). `device` and `host` are what tensors take, load and
    save included, `step` what they take in the largest micro-batch; `host_process` has what the process takes already,
    before any weight, and will take."""
    process_bytes += LATER_BYTES[engine]
    return {
        "device": dataclasses.asdict(found.device),
        "host": dataclasses.asdict(found.host),
        "host_process": {name: size + process_bytes for name, size in dataclasses.asdict(found.host).items()},
        "step_bytes": round(found.step_bytes),
        "nvme_bytes": round(found.nvme_bytes),
        "disk_bytes": round(found.disk_bytes),
        "peak": found.peak,
        "items": {item: round(size) for item, size in found.items.items()},
        "traced": found.traced,
        "micro_batch": [shape.rows, shape.tokens],
    }


def compared(prediction: dict | None, meter: Meter) -> dict:
    """The memory section of run.json: predicted, measured and `error` = predicted / measured - 1, None where one of the
    two is not known.
    """
    measured = meter.measured()
    ours = (
        {"device": None, "host": None, "tracked": None}
        if prediction is None
        else {
            "device": prediction["device"]["expected"],
            "host": prediction["host_process"]["expected"],
            "tracked": prediction["step_bytes"],
        }
    )
    theirs = {
        "device": measured["device_peak_bytes"],
        "host": measured["host_peak_bytes"],
        "tracked": measured["tracked_peak_bytes"],
    }
    error = {name: ours[name] / theirs[name] - 1 if ours[name] is not None and theirs[name] else None for name in ours}
    return {"predicted": prediction, "measured": measured, "error": error}


def expectation_line(found: Estimate, shape: Shape) -> str:
    """What a run will take and what sets it, before it starts."""
    where = "tensors" if found.on_cpu else "device"
    biggest = sorted(found.items.items(), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{item} {human_bytes(size)}" for item, size in biggest if size)
    how = "traced" if found.traced else "by formula, a wide guess"
    host = "" if found.on_cpu else f"; host {human_bytes(found.host_needed.expected)}"
    return (
        f"{where} {human_bytes(found.step_bytes)} ({how}) for {shape.rows} x {shape.tokens} tokens, most at the"
        f" {found.peak}: {parts}{host}"
    )


def comparison_lines(memory: dict) -> dict[str, str]:
    """Rows for the end-of-run summary: predicted, measured, error; measured alone where nothing was predicted."""
    measured, error, prediction = memory["measured"], memory["error"], memory["predicted"]
    if prediction is None:
        return {"host memory": f"{human_bytes(measured['host_peak_bytes'])} measured (rank 0)"}
    rows = {}
    if error["device"] is not None:
        rows["device memory"] = _row(prediction["device"]["expected"], measured["device_peak_bytes"], error["device"])
    if error["tracked"] is not None:
        rows["tensors"] = _row(prediction["step_bytes"], measured["tracked_peak_bytes"], error["tracked"])
    rows["host memory"] = (
        _row(prediction["host_process"]["expected"], measured["host_peak_bytes"], error["host"]) + " (rank 0)"
    )
    return rows


def _row(ours: float, theirs: float, error: float) -> str:
    return f"{human_bytes(ours)} predicted, {human_bytes(theirs)} measured ({error:+.1%})"


def refuse_what_cannot_fit(loaded: Loaded, found: Estimate) -> str:
    """Raises UserError where the device surely has too little; the warning to print where it may have, else an empty
    string.
    """
    if not has_accelerator():
        return ""
    limit, key = device_limit_bytes(), "training.per_device_train_batch_size"
    if found.device_needed.expected <= limit:
        return ""
    text = (
        f"{loaded.where(key)}: a rank needs {human_bytes(found.device_needed.expected)} on its device, of which tensors"
        f" are {human_bytes(found.device.expected)}, most at the {found.peak}, and it has {human_bytes(limit)}."
        " `finetune plan` names the cheapest change that makes it fit."
    )
    if found.device.low > limit:
        raise UserError(text)
    return f"warning: {text}"
