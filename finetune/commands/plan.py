"""`finetune plan`: what a recipe takes in memory, in this and in other ways of running it, and the cheapest change that
makes it fit.

Needs the model's config only: no weights, no tokenizer, no data, no GPU. The longest row is taken to have
data.max_length tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from finetune.commands.libraries import load_libraries
from finetune.commands.output import refusals_as_json, stdout_is_stderr, write_json
from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.launch.preflight import collect, resolve
from finetune.launch.strategy import Strategy, one_process
from finetune.recipe import sizes
from finetune.recipe.load import load_recipe
from finetune.report import redact
from finetune.report.text import count as counted
from finetune.report.views.plan import show


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
    with stdout_is_stderr(as_json) as output:
        with refusals_as_json(as_json, output):
            document = planned(recipe_path, overrides, launch_file, device_memory, host_memory, ranks)
        if as_json:
            write_json(document, output)
            return
    show(redact.tree(document))


def planned(
    recipe_path: str,
    overrides: Sequence[str],
    launch_file: str | None,
    device_memory: str | None,
    host_memory: str | None,
    ranks: int | None,
) -> dict[str, Any]:
    """The document of `finetune plan --json`. Raises UserError with every problem of what was asked for."""
    problems: list[str] = []
    loaded = collect(problems, lambda: load_recipe(recipe_path, overrides))
    notes: list[str] = []
    strategy = collect(problems, lambda: _strategy(launch_file, ranks, notes))
    given = {
        name: collect(problems, partial(_bytes, name, size))
        for name, size in (("--device-memory", device_memory), ("--host-memory", host_memory))
    }
    if problems or loaded is None or strategy is None:
        raise UserError(problems)
    # nothing is trained here: what reports a run need not be installed
    silent = loaded.recipe.model_copy(update={"logging": loaded.recipe.logging.model_copy(update={"report_to": []})})
    settled = resolve(dataclasses.replace(loaded, recipe=silent), strategy)
    load_libraries(strategy.use_cpu)
    from finetune.commands.plan_document import document

    return document(recipe_path, settled, given["--device-memory"], given["--host-memory"], notes)


def _strategy(launch_file: str | None, ranks: int | None, notes: list[str]) -> Strategy:
    """The launch to plan for: the file's, with so many ranks; without a file what single_gpu.yaml or multi_gpu.yaml
    would start.
    """
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks: {ranks} is no number of ranks; give 1 or more, over all machines.")
    if launch_file is None:
        count = ranks or 1
        name = "multi_gpu.yaml" if count > 1 else "single_gpu.yaml"
        notes.append(f"no launch file was given: planned for accelerate_configs/{name}, {counted(count, 'rank')}, bf16")
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
