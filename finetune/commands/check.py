"""`finetune check`: is this recipe right, with this launch file? In stages, each before anything more expensive."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.launch.preflight import Settled, advice, batch_line, first_stage, learning_rate_line
from finetune.recipe.load import Loaded
from finetune.report import redact

if TYPE_CHECKING:
    from finetune.data.prepare import PreparedData

SAMPLE_ROWS = 1000


def check(recipe_path: str, overrides: Sequence[str], launch_file: str | None, as_json: bool = False) -> None:
    """Check recipe, launch file, combination and batch (without torch), then model config, tokenizer and a data sample.

    Prints a summary, or with `as_json` one JSON document: `ok`, `problems` and, as far as they were reached, `recipe`,
    `launch`, `batch`, `warnings`, `model`, `tokenizer`, `data`, and under DeepSpeed `deepspeed`, the settings that are
    cut to the model. Raises UserError with every problem of the first stage that has one."""
    found: dict[str, Any] = {"recipe": recipe_path}
    with stdout_is_stderr() if as_json else contextlib.nullcontext(sys.stdout) as output:
        try:
            settled = first_stage(recipe_path, overrides, launch_file)
            found |= {"launch": dataclasses.asdict(settled.strategy), "batch": dataclasses.asdict(settled.batch)}
            found["warnings"] = advice(settled.loaded, settled.batch, settled.max_grad_norm)
            found |= _second_stage(settled)
            if as_json and settled.strategy.engine == "deepspeed":
                found["deepspeed"] = _deepspeed_settings(settled)
        except UserError as error:
            if as_json:
                print(
                    json.dumps(redact.tree({"ok": False, "problems": list(error.messages), **found}), indent=1),
                    file=output,
                )
            raise
        if as_json:
            print(json.dumps(redact.tree({"ok": True, "problems": [], **found}), indent=1), file=output)
        else:
            print(redact.text(_summary(recipe_path, settled, found, launch_file)), flush=True)


@contextlib.contextmanager
def stdout_is_stderr() -> Iterator[Any]:
    """Libraries print to file descriptor 1; while this holds that is stderr, and what is yielded writes to stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as output:
            yield output
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _second_stage(settled: Settled) -> dict[str, Any]:
    from finetune.engine.libraries import prepare_libraries

    prepare_libraries(settled.strategy.use_cpu)
    from finetune.model.load import facts, load_tokenizer
    from finetune.training.job import check_rows, make_schedule

    loaded = settled.loaded
    model = facts(loaded)
    tokenizer = load_tokenizer(loaded)
    samples, whole = _samples(loaded, tokenizer)
    for data in samples:
        model = check_rows(loaded, settled.strategy, model, tokenizer, data)
    counted = ("rows", "tokens", "trained_tokens", "truncated", "dropped")
    report: dict[str, Any] = {key: sum(data.summary[key] for data in samples) for key in counted}
    report |= {"longest_row_tokens": max(int(data.train.lengths.max()) for data in samples), "whole": whole}
    if whole or loaded.recipe.training.max_steps is not None:
        report["planned_steps"] = make_schedule(loaded, settled.batch, len(samples[0].train)).planned_steps
    return {
        "model": dataclasses.asdict(model),
        "tokenizer": {"class": type(tokenizer).__name__, "entries": len(tokenizer)},
        "data": report,
    }


def _deepspeed_settings(settled: Settled) -> dict[str, int]:
    from finetune.engine.deepspeed.buffers import derive_settings
    from finetune.memory.trace import outlined
    from finetune.model import load as model

    return derive_settings(outlined(settled.loaded, model.facts(settled.loaded))[2], settled.strategy)


def _samples(loaded: Loaded, tokenizer) -> tuple[list[PreparedData], bool]:
    """The first rows of every training source made into tokens as training would, and whether that is all there is."""
    from finetune.data.prepare import prepare

    section = loaded.recipe.data
    if len(section.train) == 1 or section.max_rows is not None and section.max_rows <= SAMPLE_ROWS:
        shortened = loaded.sample(SAMPLE_ROWS)
        data = prepare(shortened, tokenizer, lambda line: None)
        evaluation = data.summary["evaluation"]
        taken = data.summary["source_rows"] + (evaluation["source_rows"] if evaluation and section.eval_fraction else 0)
        limit = shortened.recipe.data.max_rows
        return [data], taken < limit or limit == section.max_rows
    share = max(1, SAMPLE_ROWS // len(section.train))
    each = [loaded.sample(share, index) for index in range(len(section.train))]
    return [prepare(one, tokenizer, lambda line: None) for one in each], False


def _summary(recipe_path: str, settled: Settled, found: dict, launch_file: str | None) -> str:
    from finetune.training.run import describe_strategy

    settings, data, model = settled.loaded.recipe, found["data"], found["model"]
    runs_on = describe_strategy(settled.strategy)
    if launch_file is None:
        runs_on += " (no launch file was given; for another: --launch accelerate_configs/X.yaml)"
    rows = f"{data['rows']:,} rows" if data["whole"] else f"a sample of {data['rows']:,} rows"
    notes = [f"{data[what]:,} {what}" for what in ("truncated", "dropped") if data[what]]
    kind = "QLoRA" if settings.model.load_in_4bit else "LoRA" if settings.lora else "full fine-tuning"
    lines = {
        "model": f"{settings.model.name_or_path} ({model['architecture']}, {model['vocabulary']:,} token ids), {kind}",
        "tokenizer": f"{found['tokenizer']['class']}, {found['tokenizer']['entries']:,} entries",
        "data": (
            f"{rows}, {data['trained_tokens']:,} of {data['tokens']:,} tokens trained, longest row"
            f" {data['longest_row_tokens']:,} tokens{''.join(f', {note}' for note in notes)}"
        ),
        "batch": (
            batch_line(settled.loaded, settled.batch)
            + (f"; {data['planned_steps']:,} steps" if "planned_steps" in data else "")
        ),
        "schedule": f"{learning_rate_line(settled.loaded, settled.batch)}, {settings.training.lr_scheduler_type}",
        "runs on": runs_on,
        "output": settings.output_dir,
    }
    shown = (f"  {name:<10} {text}" for name, text in lines.items())
    return "\n".join([f"{recipe_path} is fine", *shown, *found["warnings"]])
