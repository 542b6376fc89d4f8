"""The memory of a run before it starts; predicted beside measured, at its end; the refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.batching.plan import BatchPlan
from finetune.batching.windows import row_order, rows_of_epoch
from finetune.engine.devices import device_limit_bytes, has_accelerator
from finetune.engine.meter import Meter
from finetune.errors import UserError, reason
from finetune.launch.preflight import Resolved
from finetune.memory.estimate import ByteRange, Estimate, Items, estimate
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.strategies import fewer_activations, less_to_hold
from finetune.memory.verdict import host_range
from finetune.process.host_memory import HostMemory, gib, host_memory, swap_bytes
from finetune.recipe.load import LoadedRecipe
from finetune.report.text import count, human_bytes
from finetune.training.job import JobSpec

MOST_WINDOWS = 10_000  # that are laid out beforehand: seconds
# What a trainer's process takes from the forecast to its steps beside tensors: libraries that are imported by then,
# kernels' own memory. Medians of docs/benchmarks/memory.md's runs without it, on Linux and the CPU; a GPU's driver
# takes more, unmeasured.
LATER_BYTES = {"single": 45 * 2**20, "ddp": 50 * 2**20, "deepspeed": 110 * 2**20}


def largest_shapes(plan: JobSpec) -> list[tuple[MicroBatchShape, bool]]:
    """The micro-batches of this run that may take the most memory, each with whether it meets gradients of earlier ones
    in its window: those with the most tokens, and those with the most positions that have logits.

    From the windows of a constant batch over rows in memory, the first MOST_WINDOWS of them; else one, the most there
    could be."""
    recipe, batch, train = plan.loaded.recipe, plan.batch, plan.data.train
    sizes = plan.schedule.batch
    if recipe.data.streaming or sizes.varies or sizes.adapts:
        longest = recipe.data.max_length if recipe.data.streaming else int(train.lengths.max())
        shape = MicroBatchShape(batch.per_device_rows, longest)
        if batch.budget_tokens is not None:
            tokens = min(batch.budget_tokens, longest * math.ceil(sizes.largest_rows / batch.ranks))
            whole, rest = divmod(tokens, longest)
            shape = MicroBatchShape(1, tokens, segment_lengths=(longest,) * whole + ((rest,) if rest else ()))
        return [(shape, sizes.adapts or batch.steps(sizes.largest_rows) > 1)]
    lengths, trained = train.lengths.tolist(), train.trained.tolist()
    found: dict[tuple[bool, str], tuple[int, tuple[int, ...]]] = {}
    for window in itertools.islice(_windows(plan), MOST_WINDOWS):
        for part_of_rank in batch.deal(window, [lengths[i] for i in window]):
            for k, rows in enumerate(part_of_rank):
                sizes_by = {"tokens": _positions(batch, rows, lengths), "trained": sum(trained[i] for i in rows)}
                for name, size in sizes_by.items():
                    if size > found.get((k > 0, name), (-1, ()))[0]:
                        found[k > 0, name] = (size, rows)
    shapes = {(_shape(batch, rows, lengths, trained), later) for (later, _), (_, rows) in found.items()}
    # what begins a window meets no gradients: only a larger one can be its peak
    return [
        (shape, later)
        for shape, later in shapes
        if later
        or not any(m and s.positions >= shape.positions and s.predicting >= shape.predicting for s, m in shapes)
    ]


def _windows(plan: JobSpec) -> Iterator[list[int]]:
    """The rows of every window of a constant batch over rows in memory."""
    recipe, batch, train = plan.loaded.recipe, plan.batch, plan.data.train
    epochs = recipe.training.num_train_epochs if recipe.training.max_steps is None else None
    left = plan.schedule.planned_steps
    for epoch in itertools.count():
        rows = rows_of_epoch(len(train), math.inf if epochs is None else epochs, epoch)
        order = row_order(len(train), recipe.training.seed, epoch)[:rows].tolist()
        for first in range(0, len(order), batch.global_batch_rows):
            if not left:
                return
            left -= 1
            yield order[first : first + batch.global_batch_rows]
        if not rows:
            return


def _positions(batch: BatchPlan, rows: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a micro-batch, padding included."""
    if batch.row_tokens is None:
        return len(rows) * max([lengths[i] for i in rows], default=0)
    return sum(lengths[i] for i in rows)


def _shape(batch: BatchPlan, rows: Sequence[int], lengths: Sequence[int], trained: Sequence[int]) -> MicroBatchShape:
    predicting = sum(trained[i] for i in rows)
    if batch.row_tokens is None:
        return MicroBatchShape(len(rows), max(lengths[i] for i in rows), predicting)
    segments = tuple(lengths[i] for i in rows)
    return MicroBatchShape(1, sum(segments), predicting, segments)


def forecast(plan: JobSpec) -> tuple[Estimate, MicroBatchShape] | str:
    """The memory of this run before it starts, and the micro-batch that decides it; why it is not known, which is no
    reason not to train.
    """
    steps = max(2, plan.batch.accumulation_steps)
    try:
        found = [
            (
                estimate(plan.loaded, plan.facts, plan.strategy, shape, steps if later else 1, not has_accelerator()),
                shape,
            )
            for shape, later in largest_shapes(plan)
        ]
    except Exception as error:  # noqa: BLE001 - a model's own code may raise anything; loading it says what is really wrong
        return f"not known beforehand: {reason(error)}"
    return max(found, key=lambda pair: pair[0].step_bytes)


def predicted(found: Estimate, shape: MicroBatchShape, engine: str, process_bytes: int) -> dict:
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


def expectation_line(found: Estimate, shape: MicroBatchShape) -> str:
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


def resolved_of(plan: JobSpec, on_cpu: bool) -> Resolved:
    """Recipe, launch and batch of a plan as it runs, for the mitigations."""
    strategy = dataclasses.replace(plan.strategy, use_cpu=on_cpu)
    return Resolved(plan.loaded, strategy, plan.batch, plan.max_grad_norm)


@dataclass(frozen=True)
class Place:
    """The device of a rank, or the host of all ranks of a machine: what a run needs of its memory, and the limit.
    `parts` is one rank's, `swap_bytes` what the host has beyond the limit, `changes` what would help, in words."""

    name: str
    key: str
    need: ByteRange
    parts: Mapping[str, Items]
    ranks: int
    limit_bytes: float
    limit: str
    changes: list[str]
    swap_bytes: int = 0


def refuse_what_cannot_fit(
    plan: JobSpec,
    found: Estimate,
    say: Callable[[str], None],
    memory: HostMemory | None = None,
    device_bytes: int | None = None,
) -> None:
    """Before weights are read: raises UserError where a device or the host surely has too little memory, and warns
    where it may have. `memory` and `device_bytes`: what there is; None asks this machine."""
    device = 0 if found.on_cpu else device_bytes or device_limit_bytes()
    for place in _places(plan, found, memory or host_memory(), device):
        need, refused = place.need, place.need.low > place.limit_bytes + place.swap_bytes
        if not refused and need.expected <= place.limit_bytes:
            continue
        part, items = max(place.parts.items(), key=lambda pair: sum(pair[1].values()))
        by_size = sorted(items.items(), key=lambda pair: -pair[1])
        largest = [f"{item} {gib(size)}" for item, size in by_size if size > 0.01 * sum(items.values())]
        size, word = (need.low, "at least") if refused else (need.expected, "about")
        text = (
            f"{plan.loaded.location(place.key)}: {place.key} is {_value(plan.loaded, place.key)}: this run needs {word}"
            f" {gib(size)} GiB of {place.name} memory ({count(place.ranks, 'rank')} x {gib(size / place.ranks)} GiB,"
            f" most at the {part}: {', '.join(largest)}); the limit is {place.limit}."
        )
        advice = f" Change one of: {'; '.join(place.changes)}. `finetune plan` computes which of them fits."
        if refused:
            raise UserError(text + advice)
        say(f"warning: {text} It may run out of memory.{advice}")


def _places(plan: JobSpec, found: Estimate, memory: HostMemory, device_bytes: int) -> Iterator[Place]:
    resolved = resolved_of(plan, found.on_cpu)
    fewer = [words] if (words := fewer_activations(resolved)) else []
    if not found.on_cpu:
        key, need, parts = "training.per_device_train_batch_size", found.device_needed, found.parts["device"]
        changes = [*fewer, *less_to_hold(resolved, on_host=False)]
        yield Place("device", key, need, parts, 1, device_bytes, f"{gib(device_bytes)} GiB", changes)
    changes = [*(fewer if found.on_cpu else []), *less_to_hold(resolved, on_host=True)]
    changes.append("use a smaller model, more machines, or a higher memory limit")
    need, parts, ranks = host_range(found, plan.strategy), found.parts["host"], plan.strategy.local_ranks
    key, limit, swap = "model.name_or_path", memory.limit_bytes, swap_bytes()
    yield Place("host", key, need, parts, ranks, limit, str(memory), changes, swap)


def _value(loaded: LoadedRecipe, key: str) -> Any:
    return getattr(getattr(loaded.recipe, key.partition(".")[0]), key.partition(".")[2])
