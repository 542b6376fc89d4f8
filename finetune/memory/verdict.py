"""Whether an estimate fits a machine: fits, probably, probably not, no; unknown where nobody says how much there is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finetune.errors import UserError
from finetune.launch import compatibility
from finetune.launch.preflight import Resolved
from finetune.launch.strategy import Strategy
from finetune.memory.estimate import HOST_LIBRARIES_BYTES, ByteRange, Estimate, estimate
from finetune.memory.micro_batch import needed_bytes
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.model.facts import ModelFacts
from finetune.recipe.load import LoadedRecipe

VERDICTS = ("fits", "probably", "unknown", "probably not", "no")  # of device and host the worse one decides


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
class PlanInputs:
    """What all scenarios of a plan share."""

    settled: Resolved
    facts: ModelFacts
    tokens: int  # of the longest row
    machine: Machine


@dataclass(frozen=True)
class Scenario:
    """One way of running: `rows` per micro-batch and `steps` (K) of them; `refused` says why not."""

    name: str
    loaded: LoadedRecipe
    strategy: Strategy
    rows: int
    steps: int
    changes_mathematics: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Outcome:
    """A scenario with its bytes; `found` is None where it is refused."""

    scenario: Scenario
    found: Estimate | None
    verdict: str = ""  # one of VERDICTS
    over_device_bytes: float = 0.0  # what is expected beyond the memory there is; of one device
    over_host_bytes: float = 0.0  # of one machine

    @property
    def fits(self) -> bool | None:
        """Whether what is expected fits; None where nobody said how much there is."""
        return None if self.verdict == "unknown" else self.verdict in ("fits", "probably")


def outcome(inputs: PlanInputs, scenario: Scenario) -> Outcome:
    """The estimate of a scenario held against the machine. Incompatible settings are refused with their reason."""
    if not scenario.refused:
        rows = compatibility.met(scenario.loaded.recipe, scenario.strategy)
        scenario = dataclasses.replace(scenario, refused="; ".join(row.reason for row in rows))
    if scenario.refused:
        return Outcome(scenario, None)
    strategy, shape = scenario.strategy, MicroBatchShape(scenario.rows, inputs.tokens)
    try:
        found = estimate(scenario.loaded, inputs.facts, strategy, shape, scenario.steps, on_cpu=strategy.use_cpu)
    except UserError as error:
        if scenario.loaded is inputs.settled.loaded:
            raise
        return Outcome(dataclasses.replace(scenario, refused=error.messages[0].partition(": ")[2]), None)
    machine = inputs.machine
    device, host = device_range(found), host_range(found, strategy)
    verdicts = [judged(device, machine.device_bytes)] if not (found.on_cpu and machine.device_bytes is None) else []
    verdicts += [judged(host, machine.host_bytes)] if machine.host_bytes is not None else []
    return Outcome(
        scenario,
        found,
        max(verdicts or ["unknown"], key=VERDICTS.index),
        _over(device, machine.device_bytes),
        _over(host, machine.host_bytes),
    )


def judged(need: ByteRange, limit: float | None) -> str:
    """fits: surely enough; probably: what is expected fits; no: what is surely needed does not."""
    if limit is None:
        return "unknown"
    if need.expected <= limit:
        return "fits" if need.high <= limit else "probably"
    return "no" if need.low > limit else "probably not"


def device_range(found: Estimate) -> ByteRange:
    """What is held against a device's memory, as `auto` does it; on a CPU-only run what a step's tensors take."""
    return ByteRange(found.step_bytes, found.step_bytes, needed_bytes(found)) if found.on_cpu else found.device_needed


def host_range(found: Estimate, strategy: Strategy) -> ByteRange:
    """What all ranks of a machine take on its host. Rank 0 alone gathers the model it exports (engine.full_state_dict),
    while the others hold what they always do.
    """
    ranks = strategy.local_ranks
    sums = {part: sum(items.values()) for part, items in found.parts["host"].items()}
    saving, stays = sums.pop("save", 0.0), sums.get("optimizer step", 0.0)
    most = max(ranks * max(sums.values(), default=0.0), saving + (ranks - 1) * stays)
    factor = most / found.host.expected if found.host.expected else 1.0
    libraries = HOST_LIBRARIES_BYTES * ranks
    low, expected, high = (factor * size for size in dataclasses.astuple(found.host))
    return ByteRange(low, expected + libraries, high + 2 * libraries)


def _over(need: ByteRange, limit: float | None) -> float:
    return 0.0 if limit is None else max(0.0, need.expected - limit)
