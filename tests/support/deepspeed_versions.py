"""Released DeepSpeed versions that accumulate wrongly, as measured, and what a measurement must be to agree.

scripts/benchmarks/deepspeed_versions.py measures, compares and prints it. setup.cfg forbids these versions; the
start-up check (finetune/engine/scale_check.py) needs no table."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from finetune.launch.strategy import Strategy


@dataclass(frozen=True)
class KnownBad:
    """What was measured of released DeepSpeed versions, first to last of a row; releases between them were not run."""

    first: str
    last: str
    stages: tuple[int, ...]
    offload: bool  # with the optimizer offloaded to the CPU
    symptom: str
    thread: str = ""  # upstream's own report or repair, where one was found


_DEEPSPEED = "https://github.com/deepspeedai/DeepSpeed/"
# scripts/benchmarks/deepspeed_versions.py measures it (docs/benchmarks/deepspeed-versions.md), and a test compares: 2
# ranks, K=4, float32, relative difference of the weights from one big batch after four AdamW steps (right: 1e-7).
KNOWN_BAD = (
    KnownBad(
        "0.17.6",
        "0.18.2",
        (2,),
        False,
        "weights 3.4e-2 off, gradient norm half the true one",
        _DEEPSPEED + "issues/7718",
    ),
    KnownBad(
        "0.16.9",
        "0.18.5",
        (2,),
        True,
        "weights 2.9e-2 off, gradient norm 0.7 of the true one",
        _DEEPSPEED + "pull/7967",
    ),
    KnownBad("0.18.7", "0.18.9", (1, 2), False, "crashes in the optimizer step on CPU ranks", _DEEPSPEED + "pull/7948"),
    KnownBad("0.18.7", "0.18.9", (1, 2), True, "crashes in the optimizer step on CPU ranks", _DEEPSPEED + "pull/7948"),
)
GOOD_DEEPSPEED = "0.19.0"  # and later: every stage and offload was exact


def known_of(version: str, strategy: Strategy) -> str:
    """What the table says of this DeepSpeed version under this strategy; "" when it says nothing."""
    offload = strategy.offload_optimizer != "none"
    rows = [
        row
        for row in KNOWN_BAD
        if Version(row.first) <= Version(version) <= Version(row.last)
        and strategy.zero_stage in row.stages
        and row.offload == offload
    ]
    return "; ".join(
        f"known of deepspeed {r.first if r.first == r.last else f'{r.first} to {r.last}'}, ZeRO-"
        f"{strategy.zero_stage}{' with CPU offload' if r.offload else ''}: {r.symptom}"
        for r in rows
    )


LAYOUTS = {  # (ZeRO stage, optimizer offload, parameter offload)
    "ZeRO-1": (1, "none", "none"),
    "ZeRO-2": (2, "none", "none"),
    "ZeRO-1 + CPU offload": (1, "cpu", "none"),
    "ZeRO-2 + CPU offload": (2, "cpu", "none"),
    "ZeRO-3 + CPU offload": (3, "cpu", "cpu"),
}
EXACT_WEIGHTS, EXACT_NORM = 1e-6, 1e-5  # relative: four AdamW steps, and a gradient norm, in float32


def verdict(measured: dict) -> str:
    """ "exact", "wrong", "crashes" or "unknown" for one way of accumulating."""
    if "unknown" in measured:
        return "unknown"
    if "crash" in measured:
        return "crashes"
    exact = measured["weight_difference"] <= EXACT_WEIGHTS and all(
        abs(r - 1) <= EXACT_NORM for r in measured["norm_ratios"]
    )
    return "exact" if exact else "wrong"


def agrees(row: dict) -> bool:
    """Whether start-up check, `finetune verify` and KNOWN_BAD all say what was measured."""
    measured = verdict(row.get("ours", row))
    stage, optimizer, parameters = LAYOUTS[row["layout"]]
    strategy = Strategy("table", "deepspeed", 2, 1, "no", True, stage, optimizer, parameters)
    said = {
        row.get("selfcheck", {}).get("caught"),
        row.get("verify", {}).get("caught"),
        bool(known_of(row["version"], strategy)),
    }
    return measured == "unknown" or said == {measured != "exact"}


def told(row: dict) -> str:
    """What the start-up check and `finetune verify` say, in one cell."""
    if "unknown" in row:
        return row["unknown"]
    check, verify = row["selfcheck"], row["verify"]
    said = "crashes" if "crash" in check else "refuses" if check.get("caught") else "passes"
    status = (
        "crashes" if "crash" in verify else f"status {verify['exit_status']}" if "exit_status" in verify else "unknown"
    )
    return f"{said}, {status}"


def cell(measured: dict) -> str:
    """Weight difference, in bold and with the gradient norm when wrong."""
    if verdict(measured) in ("unknown", "crashes"):
        return f"**{verdict(measured)}**"
    difference = f"{measured['weight_difference']:.1e}"
    return difference if verdict(measured) == "exact" else f"**{difference}** (norm x {measured['norm_ratios'][0]:.2f})"
