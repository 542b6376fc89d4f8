"""The second stage of `finetune check`: model config, tokenizer and a sample of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.batching.plan import BatchPlan
from finetune.data.prepare import PreparedData, prepare
from finetune.engine.deepspeed.buffers import derive_settings
from finetune.launch.preflight import Resolved, batch_line
from finetune.model.facts import read_facts
from finetune.model.outline import outlined
from finetune.model.tokenizer import load_tokenizer
from finetune.recipe.load import LoadedRecipe
from finetune.training import banner
from finetune.training.job import check_rows, fastest, make_schedule

SAMPLE_ROWS = 1000


def model_and_data(settled: Resolved, warn: Callable[[str], None]) -> dict[str, Any]:
    """`model`, `tokenizer`, `data` and `batch` (as this model takes it) of the command's document. Raises UserError."""
    loaded = settled.loaded
    model = read_facts(loaded)
    tokenizer = load_tokenizer(loaded)
    samples, whole = _samples(loaded, tokenizer)
    for data in samples:
        model = check_rows(loaded, settled.strategy, model, tokenizer, data)
    model, batch = fastest(loaded, settled.strategy, model, settled.batch, warn)
    counted = ("rows", "tokens", "trained_tokens", "truncated", "dropped")
    report: dict[str, Any] = {key: sum(data.summary[key] for data in samples) for key in counted}
    report |= {"longest_row_tokens": max(int(data.train.lengths.max()) for data in samples), "whole": whole}
    if whole or loaded.recipe.training.max_steps is not None:
        report["planned_steps"] = make_schedule(loaded, batch, len(samples[0].train)).planned_steps
    return {
        "model": dataclasses.asdict(model),
        "tokenizer": {"class": type(tokenizer).__name__, "entries": len(tokenizer)},
        "data": report,
        "batch": dataclasses.asdict(batch),
    }


def deepspeed_settings(settled: Resolved) -> dict[str, int]:
    """DeepSpeed's buffers, sized for the model."""
    return derive_settings(outlined(settled.loaded, read_facts(settled.loaded)).weights, settled.strategy)


def _samples(loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[PreparedData], bool]:
    """The first rows of every training source made into tokens as training would, and whether that is all there is."""
    section = loaded.recipe.data
    if len(section.train) == 1 or (section.max_rows is not None and section.max_rows <= SAMPLE_ROWS):
        shortened = loaded.sample(SAMPLE_ROWS)
        data = prepare(shortened, tokenizer, lambda line: None)
        evaluation = data.summary["evaluation"]
        taken = data.summary["source_rows"] + (evaluation["source_rows"] if evaluation and section.eval_fraction else 0)
        limit = shortened.recipe.data.max_rows
        return [data], taken < limit or limit == section.max_rows
    share = max(1, SAMPLE_ROWS // len(section.train))
    each = [loaded.sample(share, index) for index in range(len(section.train))]
    return [prepare(one, tokenizer, lambda line: None) for one in each], False


def summary(recipe_path: str, settled: Resolved, found: Mapping[str, Any], launch_file: str | None) -> str:
    """The document for people."""
    settings, data, model = settled.loaded.recipe, found["data"], found["model"]
    runs_on = settled.strategy.describe()
    if launch_file is None:
        runs_on += " (no launch file was given; for another: --launch accelerate_configs/X.yaml)"
    rows = f"{data['rows']:,} rows" if data["whole"] else f"a sample of {data['rows']:,} rows"
    notes = [f"{data[what]:,} {what}" for what in ("truncated", "dropped") if data[what]]
    lines = {
        "model": (
            f"{settings.model.name_or_path} ({model['architecture']}, {model['vocabulary']:,} token ids),"
            f" {banner.method(settings)}"
        ),
        "tokenizer": f"{found['tokenizer']['class']}, {found['tokenizer']['entries']:,} entries",
        "data": (
            f"{rows}, {data['trained_tokens']:,} of {data['tokens']:,} tokens trained, longest row"
            f" {data['longest_row_tokens']:,} tokens{''.join(f', {note}' for note in notes)}"
        ),
        "batch": (
            batch_line(settled.loaded, BatchPlan(**found["batch"]))
            + (f"; {data['planned_steps']:,} steps" if "planned_steps" in data else "")
        ),
        "schedule": banner.learning_rate(settled.loaded, settled.batch),
        "runs on": runs_on,
        "output": settings.output_dir,
    }
    shown = (f"  {name:<10} {text}" for name, text in lines.items())
    return "\n".join([f"{recipe_path}: OK", *shown, *found["warnings"]])
