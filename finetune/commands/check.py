"""`finetune check`: is this recipe right, with this launch file? In stages, each before anything more expensive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from finetune.commands.libraries import load_libraries
from finetune.commands.output import refusals_as_json, stdout_is_stderr, write_json
from finetune.launch.preflight import advice, first_stage
from finetune.report import redact


def check(recipe_path: str, overrides: Sequence[str], launch_file: str | None, as_json: bool = False) -> None:
    """Check recipe, launch file, combination and batch (without torch), then model config, tokenizer and a data sample.

    Prints a summary, or with `as_json` one JSON document: `ok`, `problems` and, as far as they were reached, `recipe`,
    `launch`, `batch`, `warnings`, `model`, `tokenizer`, `data`, and under DeepSpeed `deepspeed`, the settings that are
    sized for the model. Raises UserError with every problem of the first stage that has one.
    """
    found: dict[str, Any] = {"recipe": recipe_path}
    with stdout_is_stderr(as_json) as output, refusals_as_json(as_json, output, found):
        settled = first_stage(recipe_path, overrides, launch_file)
        found |= {"launch": dataclasses.asdict(settled.strategy), "batch": dataclasses.asdict(settled.batch)}
        found["warnings"] = advice(settled.loaded, settled.batch, settled.max_grad_norm)
        load_libraries(settled.strategy.use_cpu)
        from finetune.commands.check_document import deepspeed_settings, model_and_data, summary

        found |= model_and_data(settled, found["warnings"].append)
        if not as_json:
            print(redact.text(summary(recipe_path, settled, found, launch_file)), file=output, flush=True)
            return
        if settled.strategy.engine == "deepspeed":
            found["deepspeed"] = deepspeed_settings(settled)
        write_json({"ok": True, "problems": [], **found}, output)
