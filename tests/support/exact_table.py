"""What is compared with one big batch: engines x precisions x ranks x kinds of training x K, and which launches stand
for it.

Pure and torch-free, shared by tests/exactness/test_engines.py, the launched tests/programs/exactness.py and
scripts/benchmarks/exactness.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

ENGINES: dict[str, dict] = {
    "DDP": {},  # on one rank: one process
    "ZeRO-1": dict(zero_stage=1),
    "ZeRO-2": dict(zero_stage=2),
    "ZeRO-3": dict(zero_stage=3),
    "ZeRO-2 + CPU offload": dict(zero_stage=2, offload_optimizer="cpu"),
    "ZeRO-3 + CPU offload": dict(zero_stage=3, offload_optimizer="cpu", offload_param="cpu"),
}
PRECISIONS = ("no", "bf16")
RANKS = (1, 2)
KINDS: dict[str, tuple[str, ...]] = {
    "full": (),
    "LoRA": ("lora.r=4", "lora.alpha=8"),
    "QLoRA": ("lora.r=4", "lora.alpha=8", "model.load_in_4bit=true"),
}
KS = (1, 3, 8, 17)
PER_DEVICE_ROWS = 2
CONFIGURED_STEPS = 8  # of every engine; the windows have fewer, as many, and more micro-batches

# Relative L2 difference of a clipped gradient from that of one big float32 batch. float32: DESIGN's figure, sums in
# another order. bf16: as in finetune/training/verification.py, 16 roundings of half a unit in the last place (2^-9) for
# the products in a row of two layers, forward and backward, of this engine against float32, with a factor of 2 to
# spare.
AGAINST_FLOAT32 = {"no": 1e-6, "bf16": 16 * 2.0**-8}
# The same against one batch under the same engine and precision, from the same weights, where only accumulation
# differs. In bf16 a micro-batch's gradient is rounded where it leaves its matrix product, where ranks are reduced and
# where they are averaged, the one batch's likewise: 2 x 3 times at most half a unit in the last place (2^-9) of what is
# added up.
AGAINST_THE_ENGINE = {"no": 1e-6, "bf16": 6 * 2.0**-9}


@dataclass(frozen=True)
class Launch:
    """One process group: an engine in one precision on so many ranks. Every allowed kind of training and every K runs
    in it.
    """

    engine: str
    precision: str
    ranks: int

    @property
    def name(self) -> str:
        precision = "fp32" if self.precision == "no" else self.precision
        return f"{self.engine}, {precision}, {self.ranks} rank{'s' * (self.ranks > 1)}"

    @property
    def layout(self) -> dict:
        """Keyword arguments of launch_support.launch_file."""
        return ENGINES[self.engine] | {"ranks": self.ranks, "precision": self.precision}


EVERY_LAUNCH = tuple(itertools.starmap(Launch, itertools.product(ENGINES, PRECISIONS, RANKS)))
# float32 on two ranks under every engine and on one without; bf16 on the rank count that the engine does not have yet
LAUNCHES = (
    Launch("DDP", "no", 1),
    *(Launch(engine, "no", 2) for engine in ENGINES),
    Launch("DDP", "bf16", 2),
    *(Launch(engine, "bf16", 1) for engine in ENGINES if engine not in ("DDP", "ZeRO-2")),
    Launch("ZeRO-2", "bf16", 2),  # the default of most launch files, and bf16 gradients on the wire
    Launch("ZeRO-2", "bf16", 1),
)

Combination = tuple[str, str, int, str, int]  # engine, precision, ranks, kind of training, K


def combinations(launches: Iterable[Launch], allowed: Callable[[Launch, str], bool]) -> set[Combination]:
    """What these launches run: every kind of training that is allowed, with every K."""
    return {
        (launch.engine, launch.precision, launch.ranks, kind, k)
        for launch, kind, k in itertools.product(launches, KINDS, KS)
        if allowed(launch, kind)
    }


def pairs(found: Iterable[Combination]) -> set[tuple]:
    """((factor, value), (factor, value)) for every two factors of every combination."""
    return {pair for combination in found for pair in itertools.combinations(enumerate(combination), 2)}


@dataclass(frozen=True)
class WindowCase:
    """One window: `rows` dealt to the ranks, and `empty` more micro-batches without a row on every rank."""

    name: str
    rows: int
    empty: int = 0


def windows(ranks: int) -> tuple[WindowCase, ...]:
    """Every K, full and ragged ones, a short window, a rank (or all) with an empty micro-batch, one row alone."""
    unit = PER_DEVICE_ROWS * ranks
    return (
        WindowCase("K = 17, above the configured steps", 16 * unit + 1),
        WindowCase("K = 8, full", 8 * unit),
        WindowCase("K = 3, short, one row in the last", 2 * unit + 1),
        WindowCase("K = 8, the last empty everywhere", 7 * unit - 1, empty=1),
        WindowCase("K = 1", unit),
        WindowCase("one row", 1),
    )


def random_windows(random, ranks: int, count: int) -> Iterator[WindowCase]:
    """`count` windows of any size up to K = 17, some with empty micro-batches; `random` is numpy's generator."""
    for n in range(count):
        empty = int(random.integers(0, 3))
        yield WindowCase(f"random {n + 1}", int(random.integers(1, (17 - empty) * PER_DEVICE_ROWS * ranks + 1)), empty)
