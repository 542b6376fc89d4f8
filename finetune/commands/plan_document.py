"""The document of `finetune plan`: cases and their outcomes as plain values, with what there is to copy."""

from __future__ import annotations

import dataclasses
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from finetune.engine.deepspeed.buffers import derive_settings
from finetune.engine.devices import has_accelerator
from finetune.launch.strategy import Strategy
from finetune.memory import offload_traffic
from finetune.memory.estimate import traces
from finetune.memory.strategies import (
    Case,
    Ground,
    Outcome,
    as_it_stands,
    climb,
    device_range,
    host_range,
    launch_file_of,
    nearest,
    outcome,
    table,
)
from finetune.model.parameters import ITEMS

MANY = (1, 8, 64)  # K at which offload's traffic is shown beside the recipe's own
WEIGHT_BYTES, STATE_BYTES = (
    2,
    16,
)  # per parameter: in 16 bits; with float32 gradient, master copy and AdamW's two moments beside
LINKS = {
    "pcie_bytes_per_second": offload_traffic.PCIE_4_BYTES_PER_SECOND,
    "nvme_bytes_per_second": offload_traffic.NVME_BYTES_PER_SECOND,
}


def document(recipe_path: str, ground: Ground, notes: list[str]) -> dict[str, Any]:
    """Everything that the command prints; docs/memory.md says what the keys hold. Raises UserError for what the recipe
    gets wrong.
    """
    settled = ground.settled
    strategy, batch = settled.strategy, settled.batch
    if batch.open:  # the micro-batch is chosen first, and the other strategies are shown with the same one
        stands = as_it_stands(ground)
        batch = dataclasses.replace(batch, per_device_rows=stands.case.rows, accumulation_steps=stands.case.steps)
        outcomes = _outcomes(ground, table(dataclasses.replace(settled, batch=batch)))
    else:
        stands, outcomes = _side_by_side(ground, table(settled))
    assert stands.found is not None  # settled: what is refused has been refused
    tried = climb(ground) if stands.fits is False else []
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
            "architecture": ground.facts.architecture,
            "parameters": weights.elements,
            "trained_parameters": weights.trained_elements,
            "longest_row_tokens": ground.tokens,
            "traced": stands.found.traced,
        },
        "memory": dataclasses.asdict(ground.machine),
        "fits": stands.fits,
        "verdict": stands.word,
        "as_it_stands": row(stands),
        "strategies": [row(one) for one in outcomes],
        "rungs": [row(one) for one in tried],
        "change": change and _change(recipe_path, ground, change),
        "nearest": missed and row(missed),
        "impossible": _impossible(ground, outcomes, weights.elements),
        "offload": [
            _offload(one) for one in (stands, *outcomes) if one.found and "none" != one.case.strategy.offload_optimizer
        ],
        "links": LINKS,
        "notes": notes,
    }


def _outcomes(ground: Ground, cases: list[Case]) -> list[Outcome]:
    return [outcome(ground, case) for case in cases]


def _side_by_side(ground: Ground, cases: list[Case]) -> tuple[Outcome, list[Outcome]]:
    """(the recipe as it stands, the table's outcomes). A second process traces half of them, where forking one is safe:
    without a GPU.
    """
    if sys.platform != "linux" or (os.cpu_count() or 1) < 2 or has_accelerator():
        return as_it_stands(ground), _outcomes(ground, cases)
    own = [case for case in cases if case.strategy.engine != "deepspeed" and case.loaded.recipe.lora is None]
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        rest = pool.submit(_elsewhere, ground, [case for case in cases if case not in own])
        stands, mine = as_it_stands(ground), _outcomes(ground, own)
        theirs, traced = rest.result()
    traces.update(traced)
    return stands, mine + theirs


def _elsewhere(ground: Ground, cases: list[Case]) -> tuple[list[Outcome], dict]:
    return _outcomes(ground, cases), traces


def row(one: Outcome) -> dict[str, Any]:
    """One case. Bytes of one rank, but for `host_total` and `nvme_total` (all ranks of a machine) and `disk` (all
    ranks).
    """
    case, found = one.case, one.found
    head = {
        "name": case.name,
        "engine": case.strategy.engine,
        "zero_stage": case.strategy.zero_stage,
        "offload_optimizer": case.strategy.offload_optimizer,
        "offload_param": case.strategy.offload_param,
        "micro_batch_rows": case.rows,
        "accumulation_steps": case.steps,
        "changes_mathematics": case.changes_mathematics,
        "refused": case.refused or None,
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
        "verdict": one.word,
        "fits": one.fits,
        "over_device_bytes": round(one.over_device_bytes),
        "over_host_bytes": round(one.over_host_bytes),
        "traced": found.traced,
        "peak": found.peak,
        "step_bytes": round(found.step_bytes),
        "items": {item: round(size) for item, size in items.items()},
        "device": _rounded(device_range(found)),
        "host": _rounded(found.host_needed),
        "host_total": _rounded(host_range(found, case)),
        "nvme_total": round(found.nvme_bytes * case.local_ranks),
        "disk": round(found.disk_bytes),
        "parts": {
            place: {part: {item: round(size) for item, size in items.items()} for part, items in parts.items()}
            for place, parts in found.parts.items()
        },
    }


def _rounded(need) -> dict[str, int]:
    return {name: round(size) for name, size in dataclasses.asdict(need).items()}


def _change(recipe_path: str, ground: Ground, one: Outcome) -> dict[str, Any]:
    """What makes it fit, as lines to copy: of the recipe, of the launch file, and both on one command line."""
    settled, case = ground.settled, one.case
    before, after = settled.loaded.recipe, case.loaded.recipe
    values: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    if not settled.batch.open and case.rows != settled.batch.per_device_rows:
        training["per_device_train_batch_size"] = case.rows
        if before.training.gradient_accumulation_steps != "auto":
            training["gradient_accumulation_steps"] = case.steps
    if after.training.gradient_checkpointing != before.training.gradient_checkpointing:
        training["gradient_checkpointing"] = True
    if after.model.load_in_4bit and not before.model.load_in_4bit:
        values["model"] = {"load_in_4bit": True}
    if after.lora is not None and before.lora is None:
        values["lora"] = {"r": after.lora.r, "alpha": after.lora.alpha}
    if training:
        values["training"] = training
    lines = [
        line
        for section, keys in values.items()
        for line in (f"{section}:", *(f"  {key}: {_yaml(v)}" for key, v in keys.items()))
    ]
    overrides = [f"{section}.{key}={_yaml(value)}" for section, keys in values.items() for key, value in keys.items()]
    file, launch_lines, command = _launch(settled.strategy, case.strategy, case.rows != settled.batch.per_device_rows)
    return row(one) | {
        "recipe_lines": lines,
        "launch_file": file,
        "launch_lines": launch_lines,
        "command": " ".join([*command, "finetune/train.py", recipe_path, *overrides]),
    }


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _launch(before: Strategy, after: Strategy, new_steps: bool) -> tuple[str | None, list[str], list[str]]:
    """(launch file, the lines it needs, the command); the shipped file that is nearest where the strategy is
    another.
    """
    changed = dataclasses.replace(after, source=before.source, nvme_path=before.nvme_path) != before
    fixed = (
        ["  gradient_accumulation_steps: auto"] if new_steps and before.gradient_accumulation_steps is not None else []
    )
    if not changed:
        return before.source, ["deepspeed_config:", *fixed] if fixed else [], _accelerate(before, before.source)
    shipped = launch_file_of(after)
    lines = [
        f"num_processes: {after.ranks}",
        f"mixed_precision: {after.mixed_precision if after.mixed_precision != 'no' else repr('no')}",
    ]
    lines += [f"num_machines: {after.machines}"] if after.machines > 1 else []
    lines += ["use_cpu: true"] if after.use_cpu else []
    section = []
    if shipped is None:
        section = [
            f"  zero_stage: {after.zero_stage}",
            f"  offload_optimizer_device: {after.offload_optimizer}",
            f"  offload_param_device: {after.offload_param}",
        ]
    if after.machines > 1 and after.engine == "deepspeed":
        section.append("  deepspeed_multinode_launcher: standard")
    if after.nvme_path:
        section += [f"  offload_{what}_nvme_path: {after.nvme_path}" for what in ("optimizer", "param")]
    name = f"accelerate_configs/{shipped or f'zero{after.zero_stage}.yaml'}"
    return name, lines + (["deepspeed_config:", *section] if section else []), _accelerate(after, name)


def _accelerate(strategy: Strategy, file: str) -> list[str]:
    return ["accelerate", "launch", "--config_file", file, "--num_processes", str(strategy.ranks)]


def _impossible(ground: Ground, outcomes: list[Outcome], parameters: int) -> list[str]:
    """What no micro-batch and no K can make fit, with the arithmetic; nothing where the weights alone fit a device."""
    limit = ground.machine.device_bytes
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
    case, found = one.case, one.found
    assert found is not None
    recipe = case.loaded.recipe
    settings = derive_settings(found.weights, case.strategy)
    distance = settings.get("stage3_max_reuse_distance", offload_traffic.REUSE_DISTANCE_ELEMENTS)
    moved = offload_traffic.traffic(
        found.weights, case.strategy, recipe.training.optim, recipe.training.gradient_checkpointing, distance
    )
    at = []
    for steps in sorted({*MANY, case.steps}):
        whole = moved.of_step(steps)
        seconds = offload_traffic.seconds(whole, ranks_per_disk=case.local_ranks)
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
        "name": case.name,
        "accumulation_steps": case.steps,
        "micro_batch": dataclasses.asdict(moved.micro_batch),
        "step": dataclasses.asdict(moved.step),
        "at": at,
    }
