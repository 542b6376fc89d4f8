"""The document of `finetune plan`: scenarios and their outcomes as plain values, with what there is to copy."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from finetune.commands.plan_change import lines_of
from finetune.engine.deepspeed.buffers import derive_settings
from finetune.engine.devices import device_limit_bytes, has_accelerator
from finetune.launch.compatibility import FLASH
from finetune.launch.preflight import Resolved
from finetune.memory import offload_traffic
from finetune.memory.estimate import ByteRange
from finetune.memory.micro_batch import DEVICE_MARGIN, HOST_MARGIN
from finetune.memory.resident import ITEMS
from finetune.memory.strategies import as_configured, first_that_fits, nearest, table
from finetune.memory.traced import traces
from finetune.memory.verdict import Machine, Outcome, PlanInputs, Scenario, device_range, host_range, outcome
from finetune.model.facts import read_facts
from finetune.model.proofs import with_fused_loss
from finetune.process.host_memory import host_memory
from finetune.recipe import sizes

MANY = (1, 8, 64)  # K at which offload's traffic is shown beside the recipe's own
WEIGHT_BYTES, STATE_BYTES = (
    2,
    16,
)  # per parameter: in 16 bits; with float32 gradient, master copy and AdamW's two moments beside
LINKS = {
    "pcie_bytes_per_second": offload_traffic.PCIE_4_BYTES_PER_SECOND,
    "nvme_bytes_per_second": offload_traffic.NVME_BYTES_PER_SECOND,
}


def document(
    recipe_path: str, settled: Resolved, device_bytes: int | None, host_bytes: int | None, notes: list[str]
) -> dict[str, Any]:
    """Everything that the command prints; docs/memory.md says what the keys hold. Raises UserError for what the recipe
    gets wrong.
    """
    warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft settles it itself
    attention = settled.loaded.recipe.model.attn_implementation
    if attention in FLASH and not has_accelerator():
        notes.append(f"{attention} does not run here: traced with sdpa, which keeps as much")
    model = with_fused_loss(settled.loaded, settled.strategy, read_facts(settled.loaded))
    tokens = min(settled.loaded.recipe.data.max_length, model.max_positions or sys.maxsize)
    inputs = PlanInputs(settled, model, tokens, _machine(settled, device_bytes, host_bytes))
    gc.freeze()  # traces make objects by the million, and what was imported need not be looked through each time
    return _document(recipe_path, inputs, notes)


def _machine(settled: Resolved, device: int | None, host: int | None) -> Machine:
    """What is given, then what the recipe says, then what this machine has, where it is one that would train this."""
    use_cpu, said = settled.strategy.use_cpu, settled.loaded.recipe.training.device_memory
    here = has_accelerator()
    if device is not None:
        on_device: tuple[float | None, str] = (float(device), "--device-memory")
    elif said != "auto":
        on_device = (float(sizes.parse_bytes(said)), f"training.device_memory {said}")
    elif here and not use_cpu:
        on_device = (device_limit_bytes() * (1 - DEVICE_MARGIN), f"this device, less {DEVICE_MARGIN:.0%}")
    else:
        on_device = (None, "the CPU: host memory decides" if use_cpu else "no GPU here; give --device-memory")
    if host is not None:
        on_host: tuple[float | None, str] = (float(host), "--host-memory")
    elif here or use_cpu:
        memory = host_memory()
        on_host = (memory.limit_bytes * (1 - HOST_MARGIN), f"{memory.source}, less {HOST_MARGIN:.0%}")
    else:
        on_host = (None, "no GPU here: another machine will run this; give --host-memory")
    return Machine(*on_device, *on_host)


def _document(recipe_path: str, inputs: PlanInputs, notes: list[str]) -> dict[str, Any]:
    settled = inputs.settled
    strategy, batch = settled.strategy, settled.batch
    if batch.open:  # the micro-batch is chosen first, and the other strategies are shown with the same one
        stands = as_configured(inputs)
        batch = dataclasses.replace(
            batch, per_device_rows=stands.scenario.rows, accumulation_steps=stands.scenario.steps
        )
        outcomes = _outcomes(inputs, table(dataclasses.replace(settled, batch=batch)))
    else:
        stands, outcomes = _side_by_side(inputs, table(settled))
    assert stands.found is not None  # settled: what is refused has been refused
    tried = first_that_fits(inputs) if stands.fits is False else []
    change = tried[-1] if tried and tried[-1].fits else None
    missed = nearest(tried) if tried and change is None else None
    weights = stands.found.weights
    return {
        "ok": True,
        "problems": [],
        "recipe": recipe_path,
        "launch": dataclasses.asdict(strategy),
        "batch": dataclasses.asdict(batch),
        "model": {
            "name": settled.loaded.recipe.model.name_or_path,
            "architecture": inputs.facts.architecture,
            "parameters": weights.elements,
            "trained_parameters": weights.trained_elements,
            "longest_row_tokens": inputs.tokens,
            "traced": stands.found.traced,
        },
        "memory": dataclasses.asdict(inputs.machine),
        "fits": stands.fits,
        "verdict": stands.verdict,
        "as_it_stands": row(stands),
        "strategies": [row(one) for one in outcomes],
        "rungs": [row(one) for one in tried],
        "change": change and row(change) | lines_of(recipe_path, inputs, change),
        "nearest": missed and row(missed),
        "impossible": _impossible(inputs, outcomes, weights.elements),
        "offload": [
            _offload(one)
            for one in (stands, *outcomes)
            if one.found and one.scenario.strategy.offload_optimizer != "none"
        ],
        "links": LINKS,
        "notes": notes,
    }


def _outcomes(inputs: PlanInputs, scenarios: list[Scenario]) -> list[Outcome]:
    return [outcome(inputs, scenario) for scenario in scenarios]


def _side_by_side(inputs: PlanInputs, scenarios: list[Scenario]) -> tuple[Outcome, list[Outcome]]:
    """(the recipe as it stands, the table's outcomes). A second process traces half of them, where forking one is safe:
    without a GPU.
    """
    if sys.platform != "linux" or (os.cpu_count() or 1) < 2 or has_accelerator():
        return as_configured(inputs), _outcomes(inputs, scenarios)
    own = [
        scenario
        for scenario in scenarios
        if scenario.strategy.engine != "deepspeed" and scenario.loaded.recipe.lora is None
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        rest = pool.submit(_elsewhere, inputs, [one for one in scenarios if one not in own])
        stands, mine = as_configured(inputs), _outcomes(inputs, own)
        theirs, traced = rest.result()
    traces.update(traced)
    return stands, mine + theirs


def _elsewhere(inputs: PlanInputs, scenarios: list[Scenario]) -> tuple[list[Outcome], dict]:
    return _outcomes(inputs, scenarios), traces


def row(one: Outcome) -> dict[str, Any]:
    """One scenario. Bytes of one rank, but for `host_total` and `nvme_total` (all ranks of a machine) and `disk` (all
    ranks).
    """
    scenario, found = one.scenario, one.found
    head = {
        "name": scenario.name,
        "engine": scenario.strategy.engine,
        "zero_stage": scenario.strategy.zero_stage,
        "offload_optimizer": scenario.strategy.offload_optimizer,
        "offload_param": scenario.strategy.offload_param,
        "micro_batch_rows": scenario.rows,
        "accumulation_steps": scenario.steps,
        "changes_mathematics": scenario.changes_mathematics,
        "refused": scenario.refused or None,
    }
    if found is None:
        return head | dict.fromkeys(
            (
                "verdict",
                "fits",
                "over_device_bytes",
                "over_host_bytes",
                "traced",
                "peak",
                "step_bytes",
                "items",
                "device",
                "host",
                "host_total",
                "nvme_total",
                "disk",
                "parts",
            )
        )
    need = found.host_needed if found.on_cpu else found.device_needed
    tensors = found.host if found.on_cpu else found.device
    items = {item: found.items.get(item, 0.0) for item in ITEMS}
    items["buffers"] += found.items.get("other", 0.0)
    items["overhead"] = need.expected - tensors.expected
    return head | {
        "verdict": one.verdict,
        "fits": one.fits,
        "over_device_bytes": round(one.over_device_bytes),
        "over_host_bytes": round(one.over_host_bytes),
        "traced": found.traced,
        "peak": found.peak,
        "step_bytes": round(found.step_bytes),
        "items": {item: round(size) for item, size in items.items()},
        "device": _rounded(device_range(found)),
        "host": _rounded(found.host_needed),
        "host_total": _rounded(host_range(found, scenario.strategy)),
        "nvme_total": round(found.nvme_bytes * scenario.strategy.local_ranks),
        "disk": round(found.disk_bytes),
        "parts": {
            place: {part: {item: round(size) for item, size in items.items()} for part, items in parts.items()}
            for place, parts in found.parts.items()
        },
    }


def _rounded(need: ByteRange) -> dict[str, int]:
    return {name: round(size) for name, size in dataclasses.asdict(need).items()}


def _impossible(inputs: PlanInputs, outcomes: list[Outcome], parameters: int) -> list[str]:
    """What no micro-batch and no K can make fit, with the arithmetic; nothing where the weights alone fit a device."""
    limit = inputs.machine.device_bytes
    weights = WEIGHT_BYTES * parameters
    if limit is None or weights <= limit:
        return []
    states = STATE_BYTES * parameters
    return [
        (
            f"{parameters / 1e9:,.1f} billion parameters x {WEIGHT_BYTES} bytes (16 bits) = {weights / 1e9:,.0f} GB of"
            f" weights alone, and the device has {limit / 1e9:,.1f} GB: {weights / limit:.1f} times too much, whatever"
            " the micro-batch and K."
        ),
        (
            "So on every device that holds all weights (one process, DDP, ZeRO-1, ZeRO-2) it is impossible; 4-bit"
            " weights aside. To train all, with float32 gradients, master copy and AdamW's two moments it is x"
            f" {STATE_BYTES} bytes = {states / 1e9:,.0f} GB: sharded by ZeRO-3 without offload that takes"
            f" {-(-states // int(limit))} such devices before the first activation."
        ),
    ]


def _offload(one: Outcome) -> dict[str, Any]:
    """What one rank moves, per micro-batch and per step, and how K spreads it; seconds if nothing overlaps:
    arithmetic.
    """
    scenario, found = one.scenario, one.found
    assert found is not None
    recipe = scenario.loaded.recipe
    settings = derive_settings(found.weights, scenario.strategy)
    distance = settings.get("stage3_max_reuse_distance", offload_traffic.REUSE_DISTANCE_ELEMENTS)
    moved = offload_traffic.traffic(
        found.weights, scenario.strategy, recipe.training.optim, recipe.training.gradient_checkpointing, distance
    )
    at = []
    for steps in sorted({*MANY, scenario.steps}):
        whole = moved.of_step(steps)
        seconds = offload_traffic.seconds(whole, ranks_per_disk=scenario.strategy.local_ranks)
        at.append(
            {
                "accumulation_steps": steps,
                "pcie_bytes": round(whole.pcie_bytes),
                "nvme_bytes": round(whole.nvme_bytes),
                "pcie_seconds": seconds.pcie,
                "nvme_seconds": seconds.nvme,
                "seconds_per_micro_batch": (seconds.pcie + seconds.nvme) / steps,
            }
        )
    return {
        "name": scenario.name,
        "accumulation_steps": scenario.steps,
        "micro_batch": dataclasses.asdict(moved.micro_batch),
        "step": dataclasses.asdict(moved.step),
        "at": at,
    }
