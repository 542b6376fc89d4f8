"""The change that makes a plan fit, as lines to copy into recipe and launch file, and as one command."""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune.launch.strategy import Strategy
from finetune.memory.strategies import launch_file_of
from finetune.memory.verdict import Outcome, PlanInputs


def lines_of(recipe_path: str, inputs: PlanInputs, one: Outcome) -> dict[str, Any]:
    """What makes it fit, as lines to copy: of the recipe, of the launch file, and both on one command line."""
    settled, scenario = inputs.settled, one.scenario
    before, after = settled.loaded.recipe, scenario.loaded.recipe
    values: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    if not settled.batch.open and scenario.rows != settled.batch.per_device_rows:
        training["per_device_train_batch_size"] = scenario.rows
        if before.training.gradient_accumulation_steps != "auto":
            training["gradient_accumulation_steps"] = scenario.steps
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
    file, launch_lines, command = _launch(
        settled.strategy, scenario.strategy, scenario.rows != settled.batch.per_device_rows
    )
    return {
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
