"""What a recipe would take in other ways of running it, whether that fits, and the cheapest change that does.

The ladder's order is that of what a change costs: time first, then hardware's speed, the mathematics last
(docs/memory.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.errors import UserError
from finetune.launch import compatibility
from finetune.launch.preflight import Settled
from finetune.launch.strategy import Strategy
from finetune.memory.estimate import HOST_LIBRARIES_BYTES, Estimate, Range, estimate
from finetune.memory.micro_batch import largest_that_fits, micro_batches, needed_bytes
from finetune.memory.trace import Shape
from finetune.model.facts import ModelFacts
from finetune.recipe.fields import LoraSection
from finetune.recipe.load import Loaded

# What accelerate_configs/ holds, by (engine, ZeRO stage, optimizer, parameters); tests/commands/test_plan.py reads the
# files.
LAUNCH_FILES = {
    ("single", 0, "none", "none"): "single_gpu.yaml",
    ("ddp", 0, "none", "none"): "multi_gpu.yaml",
    ("deepspeed", 1, "none", "none"): "zero1.yaml",
    ("deepspeed", 2, "none", "none"): "zero2.yaml",
    ("deepspeed", 2, "cpu", "none"): "zero2_offload.yaml",
    ("deepspeed", 3, "none", "none"): "zero3.yaml",
    ("deepspeed", 3, "cpu", "cpu"): "zero3_offload.yaml",
    ("deepspeed", 3, "nvme", "nvme"): "zero3_nvme.yaml",
}
NVME_FOLDER = "/local_nvme"


@dataclass(frozen=True)
class Machine:
    """Bytes of a device, and of the host for all ranks of a machine; None where nobody knows. `*_source`: who says
    so.
    """

    device_bytes: float | None
    device_source: str
    host_bytes: float | None
    host_source: str


@dataclass(frozen=True)
class Ground:
    """What all cases of a plan share."""

    settled: Settled
    facts: ModelFacts
    tokens: int  # of the longest row
    machine: Machine


@dataclass(frozen=True)
class Case:
    """One way of running: `rows` per micro-batch and `steps` (K) of them; `refused` says why not."""

    name: str
    loaded: Loaded
    strategy: Strategy
    rows: int
    steps: int
    changes_mathematics: bool = False
    refused: str = ""

    @property
    def local_ranks(self) -> int:
        """Ranks that share a host."""
        return max(1, self.strategy.ranks // self.strategy.machines)


@dataclass(frozen=True)
class Outcome:
    """A case with its bytes; `found` is None where it is refused."""

    case: Case
    found: Estimate | None
    word: str = ""  # fits | probably | probably not | no | unknown
    over_device_bytes: float = 0.0  # what is expected beyond the memory there is; of one device
    over_host_bytes: float = 0.0  # of one machine

    @property
    def fits(self) -> bool | None:
        """Whether what is expected fits; None where nobody said how much there is."""
        return None if self.word == "unknown" else self.word in ("fits", "probably")


def outcome(ground: Ground, case: Case) -> Outcome:
    """The estimate of a case held against the machine. What does not go together is refused with its reason."""
    if not case.refused:
        rows = compatibility.met(case.loaded.recipe, case.strategy)
        case = dataclasses.replace(case, refused="; ".join(row.reason for row in rows))
    if case.refused:
        return Outcome(case, None)
    shape = Shape(case.rows, ground.tokens, padded=case.rows > 1)
    try:
        found = estimate(case.loaded, ground.facts, case.strategy, shape, case.steps, on_cpu=case.strategy.use_cpu)
    except UserError as error:
        if case.loaded is ground.settled.loaded:
            raise
        return Outcome(dataclasses.replace(case, refused=error.messages[0].partition(": ")[2]), None)
    machine = ground.machine
    device, host = device_range(found), host_range(found, case)
    words = [judged(device, machine.device_bytes)] if not (found.on_cpu and machine.device_bytes is None) else []
    words += [judged(host, machine.host_bytes)] if machine.host_bytes is not None else []
    return Outcome(
        case,
        found,
        max(words or ["unknown"], key=WORDS.index),
        _over(device, machine.device_bytes),
        _over(host, machine.host_bytes),
    )


WORDS = ("fits", "probably", "unknown", "probably not", "no")  # of two places the worse one has the last word


def judged(need: Range, limit: float | None) -> str:
    """fits: surely enough; probably: what is expected fits; no: what is surely needed does not."""
    if limit is None:
        return "unknown"
    return (
        "fits"
        if need.high <= limit
        else "probably"
        if need.expected <= limit
        else "no"
        if need.low > limit
        else "probably not"
    )


def device_range(found: Estimate) -> Range:
    """What is held against a device's memory, as `auto` does it; on a CPU-only run what a step's tensors take."""
    return Range(found.step_bytes, found.step_bytes, needed_bytes(found)) if found.on_cpu else found.device_needed


def host_range(found: Estimate, case: Case) -> Range:
    """What all ranks of a machine take on its host. Without DeepSpeed rank 0 saves alone, while the others hold what
    they always do.
    """
    sums = {part: sum(items.values()) for part, items in found.parts["host"].items()}
    saving = sums.pop("save", 0.0) if case.strategy.engine != "deepspeed" else 0.0
    stays = sums.get("optimizer step", 0.0)
    most = max(case.local_ranks * max(sums.values(), default=0.0), saving + (case.local_ranks - 1) * stays)
    factor = most / found.host.expected if found.host.expected else 1.0
    libraries = HOST_LIBRARIES_BYTES * case.local_ranks
    return Range(
        found.host.low * factor, found.host.expected * factor + libraries, found.host.high * factor + 2 * libraries
    )


def _over(need: Range, limit: float | None) -> float:
    return 0.0 if limit is None else max(0.0, need.expected - limit)


def as_it_stands(ground: Ground) -> Outcome:
    """The recipe under its launch. An open micro-batch is the largest that fits, or one row."""
    settled = ground.settled
    batch = settled.batch
    case = Case("this recipe", settled.loaded, settled.strategy, batch.per_device_rows, batch.accumulation_steps)
    if not batch.open or (ground.machine.device_bytes is None and ground.machine.host_bytes is None):
        return outcome(ground, case)
    return _largest(ground, case, micro_batches(settled)) or outcome(ground, case)


def _largest(ground: Ground, case: Case, sizes: Sequence[int]) -> Outcome | None:
    """The case with the largest of these micro-batches that fits, the global batch as it was; None where not even the
    smallest does.
    """
    known: dict[int, Outcome] = {}
    of_rank = ground.settled.batch.global_batch_rows // ground.settled.batch.ranks

    def fits(rows: int) -> bool:
        known[rows] = outcome(ground, dataclasses.replace(case, rows=rows, steps=of_rank // rows))
        return known[rows].fits is True

    if not sizes or not fits(sizes[0]):
        return None
    chosen = largest_that_fits(sizes, fits)
    return known[chosen or sizes[0]]


def table(settled: Settled) -> list[Case]:
    """The strategies side by side: every weight trained until LoRA; activations recomputed, and K > 1, from "+
    checkpointing" on.
    """
    base, batch, loaded = settled.strategy, settled.batch, settled.loaded
    rows, steps = batch.per_device_rows, max(2, batch.accumulation_steps)
    whole = batch.global_batch_rows // batch.ranks
    kept = with_adapters(recomputing(loaded, False), None)
    full = recomputing(kept, True)
    adapters = loaded.recipe.lora or LoraSection()
    one = plain(base)
    offload = sharded(base, 3, "cpu", "cpu")
    return [
        Case("whole batch, K=1", kept, one, whole, 1),
        Case("same micro-batch, K=1", kept, one, rows, 1),
        Case("accumulation, K>1", kept, one, rows, steps),
        Case("+ checkpointing", full, one, rows, steps),
        *(Case(f"ZeRO-{stage}", full, sharded(base, stage), rows, steps) for stage in (1, 2, 3)),
        Case("ZeRO-3 + CPU offload, K=1", full, offload, rows, 1),
        Case("ZeRO-3 + CPU offload, K>1", full, offload, rows, steps),
        Case("ZeRO-3 + NVMe offload", full, sharded(base, 3, "nvme", "nvme"), rows, steps),
        Case("LoRA", with_adapters(full, adapters), one, rows, steps, True),
        Case("QLoRA", with_adapters(full, adapters, four_bits=True), one, rows, steps, True),
    ]


def ladder(settled: Settled) -> list[Case]:
    """The rungs in their order, each with all that those before it changed. `rows` is the recipe's; `climb` finds the
    rung's own.

    Sharding helps only where there are several ranks. LoRA and QLoRA change the mathematics: they come last, and begin
    again at the launch as it was given, because what they leave out is what the rungs before them share and offload.
    """
    loaded, strategy, batch = settled.loaded, settled.strategy, settled.batch
    cases: list[Case] = []

    def rung(name: str, mathematics: bool = False) -> None:
        cases.append(Case(name, loaded, strategy, batch.per_device_rows, batch.accumulation_steps, mathematics))

    if batch.per_device_rows > 1:
        rung("smaller micro-batch")
    if not loaded.recipe.training.gradient_checkpointing:
        loaded = recomputing(loaded, True)
        rung("gradient checkpointing")
    for stage in (2, 3):
        if strategy.ranks > 1 and strategy.zero_stage < stage:
            strategy = sharded(strategy, stage, strategy.offload_optimizer, strategy.offload_param)
            rung(f"ZeRO-{stage}")
    if strategy.offload_optimizer == "none":
        strategy = sharded(strategy, max(2, strategy.zero_stage), "cpu")
        rung("optimizer offload")
    if strategy.offload_param == "none":
        strategy = sharded(strategy, 3, strategy.offload_optimizer, "cpu")
        rung("parameter offload")
    if "nvme" not in (strategy.offload_optimizer, strategy.offload_param):
        strategy = sharded(strategy, 3, "nvme", "nvme")
        rung("NVMe offload")
    adapters = settled.loaded.recipe.lora
    if adapters is None:
        loaded, strategy = with_adapters(loaded, adapters := LoraSection()), settled.strategy
        rung("LoRA", True)
        if strategy.offload_param == "none":
            strategy = sharded(strategy, 3, "cpu", "cpu")
            rung("LoRA with parameter offload", True)
    if not settled.loaded.recipe.model.load_in_4bit:
        loaded, strategy = with_adapters(loaded, adapters, four_bits=True), plain(settled.strategy)
        rung("QLoRA", True)
    return cases


def climb(ground: Ground) -> list[Outcome]:
    """The rungs that were tried, the last of which is the first that fits, if one does.

    A rung takes the largest micro-batch that fits, up to the recipe's; where not one row fits, its outcome is that of
    one row."""
    settled, tried = ground.settled, []
    sizes = micro_batches(settled)
    for case in ladder(settled):
        below = case.name == "smaller micro-batch"
        mine = [n for n in sizes if settled.batch.open or n < case.rows + (not below)] or [case.rows]
        found = _largest(ground, case, mine)
        of_rank = settled.batch.global_batch_rows // settled.batch.ranks
        tried.append(found or outcome(ground, dataclasses.replace(case, rows=mine[0], steps=of_rank // mine[0])))
        if found:
            break
    return tried


def nearest(tried: Sequence[Outcome]) -> Outcome | None:
    """Of rungs that do not fit, the one that misses by least, device and host together."""
    missed = [one for one in tried if one.found is not None]
    return min(missed, key=lambda one: one.over_device_bytes + one.over_host_bytes, default=None)


def plain(strategy: Strategy) -> Strategy:
    """The same ranks without DeepSpeed."""
    engine = "ddp" if strategy.ranks > 1 else "single"
    return dataclasses.replace(
        strategy, engine=engine, zero_stage=0, offload_optimizer="none", offload_param="none", nvme_path=None
    )


def sharded(strategy: Strategy, stage: int, optimizer: str = "none", parameters: str = "none") -> Strategy:
    """The same ranks under ZeRO."""
    folder = (strategy.nvme_path or NVME_FOLDER) if "nvme" in (optimizer, parameters) else None
    return dataclasses.replace(
        strategy,
        engine="deepspeed",
        zero_stage=stage,
        offload_optimizer=optimizer,
        offload_param=parameters,
        nvme_path=folder,
    )


def recomputing(loaded: Loaded, on: bool) -> Loaded:
    """The recipe with gradient checkpointing on or off."""
    training = loaded.recipe.training.model_copy(update={"gradient_checkpointing": on})
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"training": training}))


def with_adapters(loaded: Loaded, lora: LoraSection | None, four_bits: bool = False) -> Loaded:
    """The recipe with these adapters, or with every weight trained."""
    model = loaded.recipe.model.model_copy(update={"load_in_4bit": four_bits})
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"lora": lora, "model": model}))


def launch_file_of(strategy: Strategy) -> str | None:
    """The shipped launch file of this engine, stage and offload; None where none matches."""
    key = (strategy.engine, strategy.zero_stage, strategy.offload_optimizer, strategy.offload_param)
    return None if strategy.use_cpu else LAUNCH_FILES.get(key)
