"""What a recipe takes under a launch: one rank's bytes by place, by part of the run and by item.

Activations, losses and one process's whole step are traced (trace.py); what engines shard, offload and buffer is
arithmetic (formulas.py, zero/). Where a model cannot be traced, formulas with a wide range stand in, and `traced`
says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.engine.deepspeed import buffers
from finetune.launch.strategy import Strategy
from finetune.memory import activations, formulas
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.resident import Resident
from finetune.memory.trace import Precision, Profile, part_of
from finetune.memory.traced import traced_once
from finetune.memory.zero.stages import resident_sharded
from finetune.model.facts import ModelFacts
from finetune.model.parameters import Weights
from finetune.recipe.load import LoadedRecipe

Items = Mapping[str, float]
DYNAMIC = ("activations", "logits and loss")  # what no engine shards
# Beside tensors. No GPU has measured the device's yet: NVIDIA's context and workspaces take a few hundred MiB, and the
# caching allocator keeps blocks it cannot reuse. The host's: a trainer's imports on Linux (docs/benchmarks/memory.md).
DEVICE_CONTEXT_BYTES = 0.6 * 2**30
FRAGMENTED_SHARE = 0.05
HOST_LIBRARIES_BYTES = 0.5 * 2**30
TRACED_SPREAD = (0.97, 1.05)  # other kernels than the traced ones: attention, workspaces
ENGINE_SPREAD = (0.9, 1.1)  # what DDP and ZeRO hold is arithmetic; one process on the CPU is traced to the byte


@dataclass(frozen=True)
class ByteRange:
    """`low` is surely needed, `high` surely enough."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """One rank's bytes. `parts[place][part][item]` is what is there at the peak of a part of the run; `device` and
    `host` are the peaks over all parts, of tensors alone. On a CPU-only run everything is in `host`."""

    parts: Mapping[str, Mapping[str, Items]]
    device: ByteRange
    host: ByteRange
    nvme_bytes: float
    disk_bytes: float  # checkpoints that are kept, one more while it is written, and the exported model: over all ranks
    traced: bool
    weights: Weights
    on_cpu: bool

    @property
    def place(self) -> str:
        """Where the step runs."""
        return "host" if self.on_cpu else "device"

    @property
    def peak(self) -> str:
        """The part of the run that sets the peak where the step runs."""
        parts = self.parts[self.place]
        return max(parts, key=lambda part: sum(parts[part].values()))

    @property
    def items(self) -> Items:
        """What is there at that peak."""
        return self.parts[self.place][self.peak]

    @property
    def step_bytes(self) -> float:
        """The most that tensors take where the step runs, outside loading and saving."""
        return max(
            sum(items.values()) for part, items in self.parts[self.place].items() if part not in ("load", "save")
        )

    @property
    def device_needed(self) -> ByteRange:
        """The device's tensors with what the driver and the allocator take on top."""
        if self.on_cpu:
            return ByteRange(0.0, 0.0, 0.0)
        low, expected, high = dataclasses.astuple(self.device)
        context = DEVICE_CONTEXT_BYTES
        return ByteRange(
            low, expected * (1 + FRAGMENTED_SHARE) + context, high * (1 + 2 * FRAGMENTED_SHARE) + 2 * context
        )

    @property
    def host_needed(self) -> ByteRange:
        """One rank's tensors on the host with its libraries."""
        low, expected, high = dataclasses.astuple(self.host)
        return ByteRange(low, expected + HOST_LIBRARIES_BYTES, high + 2 * HOST_LIBRARIES_BYTES)


def estimate(
    loaded: LoadedRecipe,
    facts: ModelFacts,
    strategy: Strategy,
    shape: MicroBatchShape,
    accumulation_steps: int,
    on_cpu: bool,
) -> Estimate:
    """The bytes of one rank that trains micro-batches of this shape, so many per optimizer step.

    Raises UserError where the recipe asks for what this model does not have.
    """
    precision = Precision(
        strategy.mixed_precision, strategy.engine == "deepspeed", on_cpu, fp32_adapters=strategy.zero_stage == 3
    )
    # of engines that hold the gradients, only activations and losses are traced, and K changes nothing there
    seen = traced_once(
        loaded, facts, shape, min(accumulation_steps, 2) if strategy.engine == "single" else 1, precision
    )
    traced = seen is not None
    seen = seen or activations.profile_by_formula(loaded, facts, shape, precision)
    seen = dataclasses.replace(seen, weights=_packed(seen.weights))
    resident = _resident(loaded, strategy, seen.weights, on_cpu, accumulation_steps)
    window = _alone(seen, resident, loaded) if strategy.engine == "single" and traced else _sharded(seen, resident)
    # at both ends no window has gradients of earlier micro-batches
    between = _resident(loaded, strategy, seen.weights, on_cpu, 1)
    total = strategy.engine == "deepspeed"
    parts = {
        place: {**_edge(between, place, "load", total), **window[place], **_edge(between, place, "save", total)}
        for place in ("device", "host")
    }
    if on_cpu:
        parts = {
            "device": {},
            "host": {
                part: _sum(parts["device"].get(part, {}), parts["host"].get(part, {})) for part in parts["device"]
            },
        }
    spread = TRACED_SPREAD if not on_cpu else (1.0, 1.0) if strategy.engine == "single" and traced else ENGINE_SPREAD
    dynamic = spread if traced else (activations.LOW, activations.HIGH)
    ranges = {place: _range(parts[place], spread, dynamic) for place in parts}
    needed = _without_file_pages(parts["host"], seen.weights, strategy, facts, on_cpu)
    host = dataclasses.replace(ranges["host"], low=_peak(needed, spread[0], dynamic[0]))
    one = formulas.checkpoint_bytes(seen.weights, loaded.recipe.training.optim, strategy)
    # every checkpoint that is kept, the next one before an older goes (checkpoint/snapshots.py), and the model
    disk = (loaded.recipe.checkpoint.save_total_limit + 1) * one
    disk += formulas.exported_bytes(seen.weights, facts.export_dtype)
    return Estimate(parts, ranges["device"], host, sum(resident.nvme.values()), disk, traced, seen.weights, on_cpu)


def _packed(weights: Weights) -> Weights:
    """What is traced in 16 bits because bitsandbytes cannot be, with the bytes that it takes in NF4."""
    return dataclasses.replace(
        weights,
        all=tuple(
            dataclasses.replace(w, bytes_each=formulas.nf4_bytes(w.elements) / w.elements) if w.quantised else w
            for w in weights.all
        ),
    )


def _resident(loaded: LoadedRecipe, strategy: Strategy, weights: Weights, on_cpu: bool, micro_batches: int) -> Resident:
    optim = loaded.recipe.training.optim
    if strategy.engine == "deepspeed":
        return resident_sharded(
            weights, strategy, optim, buffers.derive_settings(weights, strategy), on_cpu, micro_batches > 1
        )
    return formulas.resident_plain(weights, strategy.ranks, optim, on_cpu, micro_batches > 1)


def _alone(seen: Profile, resident: Resident, loaded: LoadedRecipe) -> dict[str, dict[str, Items]]:
    """One process: the traced parts as they are, but for what cannot be traced: packed weights and 8-bit states."""
    device: dict[str, Items] = {}
    for name, series in seen.series.items():
        most = max(series, key=_total)
        kinds: dict[str, float] = {**most}
        if loaded.recipe.model.load_in_4bit:
            kinds["parameters"] = resident.device["parameters"]
        if not kinds.get("optimizer states"):
            kinds["optimizer states"] = resident.device.get("optimizer states", 0.0)
        part = part_of(name)
        device[part] = max(device.get(part, {}), kinds, key=_total)
    return {"device": device, "host": {part: dict(resident.host) for part in device}}


def _sharded(seen: Profile, resident: Resident) -> dict[str, dict[str, Items]]:
    """Several ranks, or DeepSpeed: the traced activations and losses on top of what the engine holds."""
    window: dict[str, dict[str, Items]] = {"device": {}, "host": {}}
    for part in ("forward", "loss", "layer", "optimizer step"):
        extra = {"layer": resident.backward, "optimizer step": resident.step}.get(part, {})
        device = _sum(resident.device, extra.get("device", {}))
        if part != "optimizer step":
            gathered = {"buffers": resident.gathered_bytes}
            device = _sum(_sum(device, gathered), seen.most(part, DYNAMIC))
        window["device"][part] = device
        window["host"][part] = _sum(resident.host, extra.get("host", {}))
    return window


def _edge(resident: Resident, place: str, part: str, total: bool) -> dict[str, Items]:
    """`load` or `save` at a place; nothing where the formulas say nothing of it. `total`: they say all that is there
    (zero/), else what comes on top."""
    items = getattr(resident, part)
    return {part: _sum({} if total else getattr(resident, place), items.get(place, {}))} if items else {}


def _total(items: Mapping[str, float]) -> float:
    return sum(items.values())


def _sum(a: Items, b: Items) -> dict[str, float]:
    return {item: a.get(item, 0.0) + b.get(item, 0.0) for item in {*a, *b}}


def _without_file_pages(
    parts: Mapping[str, Items], weights: Weights, strategy: Strategy, facts: ModelFacts, on_cpu: bool
) -> dict[str, Items]:
    """A host's parts without the weights that are pages of the checkpoint's files, which the kernel can drop and read
    again: frozen ones, and on their way to a GPU those that are trained in the type of the files. Under ZeRO-3 each
    rank has a copy of its share."""
    if strategy.zero_stage == 3:
        return dict(parts)
    trained_too = not on_cpu and facts.export_dtype == "float32"
    mapped = sum(w.elements * w.bytes_each for w in weights.all if not w.quantised and (trained_too or not w.trained))
    return {
        part: {**items, "parameters": max(0.0, items.get("parameters", 0.0) - mapped * (on_cpu or part == "load"))}
        for part, items in parts.items()
    }


def _range(parts: Mapping[str, Items], spread: tuple[float, float], dynamic: tuple[float, float]) -> ByteRange:
    """The peak, with these factors for its ends; `dynamic` those of activations and losses."""
    return ByteRange(_peak(parts, spread[0], dynamic[0]), _peak(parts), _peak(parts, spread[1], dynamic[1]))


def _peak(parts: Mapping[str, Items], factor: float = 1.0, dynamic: float = 1.0) -> float:
    sums = (sum(size * (dynamic if item in DYNAMIC else factor) for item, size in p.items()) for p in parts.values())
    return max(sums, default=0.0)
