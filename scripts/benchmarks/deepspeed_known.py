"""Released DeepSpeed versions that accumulate wrongly, as measured: deepspeed_versions.py compares and prints it.

setup.cfg forbids these versions; the start-up check (finetune/engine/scale_check.py) needs no table."""

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
# deepspeed_versions.py measures it (docs/benchmarks/deepspeed-versions.md), and a test compares: 2 ranks, K=4, float32,
# relative difference of the weights from one big batch after four AdamW steps (right: 1e-7).
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
