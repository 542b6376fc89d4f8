"""`finetune plan`: what a recipe takes in memory, in this and in other ways of running it, and the cheapest change that
makes it fit.

Needs the model's config only: no weights, no tokenizer, no data, no GPU. The longest row is taken to have
data.max_length tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.commands.check import stdout_is_stderr
from finetune.errors import UserError
from finetune.launch.compatibility import FLASH
from finetune.launch.config_file import read_launch_file
from finetune.launch.preflight import Settled, collect, settle
from finetune.launch.strategy import Strategy, one_process
from finetune.recipe import sizes
from finetune.recipe.load import Loaded, load_recipe
from finetune.report import redact

if TYPE_CHECKING:
    from finetune.memory.strategies import Machine


def plan(
    recipe_path: str,
    overrides: Sequence[str],
    launch_file: str | None,
    device_memory: str | None,
    host_memory: str | None,
    ranks: int | None,
    as_json: bool = False,
) -> None:
    """Print the plan, or with `as_json` one JSON document: docs/memory.md says what its keys hold. Raises UserError."""
    with stdout_is_stderr() if as_json else contextlib.nullcontext(sys.stdout) as output:
        try:
            document = planned(recipe_path, overrides, launch_file, device_memory, host_memory, ranks)
        except UserError as error:
            if as_json:
                print(json.dumps(redact.tree({"ok": False, "problems": list(error.messages)}), indent=1), file=output)
            raise
        if as_json:
            print(json.dumps(redact.tree(document), indent=1), file=output)
            return
    from finetune.report.views.plan import show

    show(redact.tree(document))


def planned(
    recipe_path: str,
    overrides: Sequence[str],
    launch_file: str | None,
    device_memory: str | None,
    host_memory: str | None,
    ranks: int | None,
) -> dict:
    """The document of `finetune plan --json`. Raises UserError with every problem of what was asked for."""
    problems: list[str] = []
    loaded = collect(problems, lambda: load_recipe(recipe_path, overrides))
    notes: list[str] = []
    strategy = collect(problems, lambda: _strategy(launch_file, ranks, notes))
    given = {
        name: collect(problems, lambda name=name, size=size: _bytes(name, size))
        for name, size in (("--device-memory", device_memory), ("--host-memory", host_memory))
    }
    if problems or loaded is None or strategy is None:
        raise UserError(problems)
    # nothing is trained here: what reports a run need not be installed
    silent = loaded.recipe.model_copy(update={"logging": loaded.recipe.logging.model_copy(update={"report_to": []})})
    settled = settle(dataclasses.replace(loaded, recipe=silent), strategy)
    from finetune.engine.libraries import prepare_libraries

    prepare_libraries(strategy.use_cpu)
    warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft settles it itself
    from finetune.commands.plan_document import document
    from finetune.memory.strategies import Ground
    from finetune.model.load import facts

    settled = dataclasses.replace(settled, loaded=_traceable(settled.loaded, notes))
    model = facts(settled.loaded)
    tokens = min(settled.loaded.recipe.data.max_length, model.max_positions or sys.maxsize)
    ground = Ground(settled, model, tokens, _machine(settled, given["--device-memory"], given["--host-memory"]))
    gc.freeze()  # traces make objects by the million, and what was imported need not be looked through each time
    return document(recipe_path, ground, notes)


def _strategy(launch_file: str | None, ranks: int | None, notes: list[str]) -> Strategy:
    """The launch to plan for: the file's, with so many ranks; without a file what single_gpu.yaml or multi_gpu.yaml
    would start.
    """
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks: {ranks} is no number of ranks; give 1 or more, over all machines.")
    if launch_file is None:
        count = ranks or 1
        name = "multi_gpu.yaml" if count > 1 else "single_gpu.yaml"
        notes.append(
            f"no launch file was given: planned for accelerate_configs/{name}, {count} rank{'s' * (count > 1)}, bf16"
        )
        found = one_process("bf16")
        return dataclasses.replace(
            found, source=f"accelerate_configs/{name}", engine="ddp" if count > 1 else "single", ranks=count
        )
    found = read_launch_file(launch_file)
    if ranks is None or ranks == found.ranks:
        return found
    if ranks % found.machines:
        raise UserError(f"--ranks: {ranks} ranks do not divide over the {found.machines} machines of {launch_file}.")
    notes.append(f"--ranks {ranks} stands instead of the {found.ranks} of {launch_file}")
    engine = found.engine if found.engine == "deepspeed" else "ddp" if ranks > 1 else "single"
    return dataclasses.replace(found, ranks=ranks, engine=engine)


def _bytes(name: str, size: str | None) -> int | None:
    try:
        return None if size is None else sizes.parse_bytes(size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _machine(settled: Settled, device: int | None, host: int | None) -> Machine:
    """What is given, then what the recipe says, then what this machine has, where it is one that would train this."""
    from finetune.engine.devices import device_limit_bytes, has_accelerator
    from finetune.memory.micro_batch import DEVICE_MARGIN, HOST_MARGIN
    from finetune.memory.strategies import Machine
    from finetune.process.host_memory import host_memory

    use_cpu, said = settled.strategy.use_cpu, settled.loaded.recipe.training.device_memory
    here = has_accelerator()
    if device is not None:
        on_device = (float(device), "--device-memory")
    elif said != "auto":
        on_device = (float(sizes.parse_bytes(said)), f"training.device_memory {said}")
    elif here and not use_cpu:
        on_device = (device_limit_bytes() * (1 - DEVICE_MARGIN), f"this device, less {DEVICE_MARGIN:.0%}")
    else:
        on_device = (None, "the CPU: host memory decides" if use_cpu else "no GPU here; give --device-memory")
    if host is not None:
        on_host = (float(host), "--host-memory")
    elif here or use_cpu:
        memory = host_memory()
        on_host = (memory.limit_bytes * (1 - HOST_MARGIN), f"{memory.source}, less {HOST_MARGIN:.0%}")
    else:
        on_host = (None, "no GPU here: another machine will run this; give --host-memory")
    return Machine(*on_device, *on_host)


def _traceable(loaded: Loaded, notes: list[str]) -> Loaded:
    """Flash attention need not be installed where nothing is trained."""
    from finetune.engine.devices import has_accelerator

    model = loaded.recipe.model
    if model.attn_implementation not in FLASH or has_accelerator():
        return loaded
    notes.append(f"{model.attn_implementation} does not run here: traced with sdpa, which keeps as much")
    changed = loaded.recipe.model_copy(update={"model": model.model_copy(update={"attn_implementation": "sdpa"})})
    return dataclasses.replace(loaded, recipe=changed)
