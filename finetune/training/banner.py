"""The facts that a run and `finetune check` show of a recipe, said in one place; how a run begins and ends in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.batching.plan import BatchPlan
from finetune.engine.devices import device_name
from finetune.launch.preflight import batch_line, learning_rate_line
from finetune.recipe.fields import Recipe
from finetune.recipe.load import LoadedRecipe
from finetune.report.text import count, human_seconds
from finetune.training.job import Job


def method(recipe: Recipe) -> str:
    """How the weights are trained: full fine-tuning, LoRA or QLoRA."""
    return "QLoRA" if recipe.model.load_in_4bit else "LoRA" if recipe.lora else "full fine-tuning"


def learning_rate(loaded: LoadedRecipe, batch: BatchPlan) -> str:
    """The peak learning rate and the shape it has over the run."""
    return f"{learning_rate_line(loaded, batch)}, {loaded.recipe.training.lr_scheduler_type}"


def facts(job: Job, output_dir: Path, expectation: str) -> dict[str, str]:
    """What a run begins with, as `name: value` lines."""
    plan, described = job.plan, job.description
    recipe = plan.loaded.recipe
    share = described["trained_parameters"] / described["parameters"]
    frozen = f" on frozen {described['frozen_type']} weights" if described["frozen_type"] else ""
    clipping = f"gradients clipped at {plan.max_grad_norm:g}" if plan.max_grad_norm else "gradients not clipped"
    return {
        "model": f"{recipe.model.name_or_path} ({plan.facts.architecture}, {described['parameters']:,} parameters)",
        "training": (
            f"{method(recipe)}{frozen}, {described['trained_parameters']:,} parameters trained ({share:.1%}),"
            f" {described['optimizer']}"
        ),
        "data": _data(job),
        "batch": batch_line(plan.loaded, plan.batch),
        "schedule": f"{_length(job)}, {learning_rate(plan.loaded, plan.batch)} after {_warmup(job)}, {clipping}",
        "runs on": f"{device_name()}: {plan.strategy.describe()}",
        "memory": expectation,
        "output": str(output_dir),
    }


def _data(job: Job) -> str:
    data = job.plan.data.summary
    if job.plan.loaded.recipe.data.streaming:
        text = f"streamed, {data['trained_tokens'] / data['tokens']:.0%} of the first rows' tokens trained"
    else:
        rows = count(job.train_row_count, "row")
        text = f"{rows}, {data['trained_tokens']:,} of {data['tokens']:,} tokens trained"
    return text + (f", {count(len(job.evaluation_rows), 'row')} held out" if job.evaluation_rows else "")


def _length(job: Job) -> str:
    length = count(job.schedule.planned_steps, "step")
    if job.schedule.total_rows is None:
        return length
    epochs = job.plan.loaded.recipe.training.num_train_epochs
    assert epochs is not None, "rows end the run, so the recipe counts epochs"
    return f"{length} ({count(epochs, 'epoch')} of {count(job.train_row_count, 'row')})"


def _warmup(job: Job) -> str:
    if job.schedule.warmup_share is None:
        return f"{count(job.schedule.warmup_steps, 'step')} of warm-up"
    return f"warming up for {job.schedule.warmup_share:.4g} of the run"


def results(summary: Mapping, output_dir: Path, memory: Mapping[str, str]) -> dict[str, str]:
    """What a run ends with, as `name: value` lines; `memory` are those of its memory."""
    rows = {
        "steps": (
            f"{summary['steps']} in {human_seconds(summary['seconds'])},"
            f" {summary['tokens_per_second']:,.0f} trained tokens/s"
        )
    }
    if summary["eval_loss_first"] is not None:
        first, last = summary["eval_loss_first"], summary["eval_loss_last"]
        rows["held-out loss"] = f"{first:.4f} -> {last:.4f} ({(last - first) / first:+.1%})"
    return rows | dict(memory) | {"model": summary["model"], "metrics": str(output_dir / "metrics.jsonl")}
