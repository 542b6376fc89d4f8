"""A training run inside its process: recipe -> plan -> job -> steps -> exported model, and what it leaves in the folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finetune import launch, recipe
from finetune.backend.parents import check_ranks_asked_for, launched_by
from finetune.errors import UserError
from finetune.exits import INTERRUPTED, guarded
from finetune.launch import Strategy
from finetune.preflight import advice, batch_line, learning_rate_line, settle
from finetune.recipe import Loaded

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")


def run_rank(argv: Sequence[str]) -> None:
    """The trainer process: train the recipe in `argv` and exit with the status that says how it ended. Does not return."""

    def body() -> None:
        if not argv or argv[0].startswith("-"):
            raise UserError(f"train.py: expected a recipe first, found {' '.join(argv) or 'nothing'}. Usage: accelerate"
                            " launch finetune/train.py recipe.yaml [key=value ...]")  # fmt: skip
        train_in_place(argv[0], list(argv[1:]))

    sys.exit(guarded(body))


def train_in_place(recipe_path: str, overrides: Sequence[str]) -> None:
    """Train in this process, one of the ranks of a launch (or alone). Raises FinetuneError for every expected end."""
    loaded = recipe.load(recipe_path, overrides)
    ranks_asked, launch_file = launched_by()
    strategy = launch.from_environment(os.environ, launch_file)
    check_ranks_asked_for(strategy, ranks_asked)
    settle(loaded, strategy)  # for its refusals, before seconds go by with imports
    output_dir = Path(loaded.recipe.output_dir).absolute()
    from finetune.report.console import Console
    from finetune.report.files import RunFiles, folder_state

    console = Console(enabled=int(os.environ.get("RANK", "0")) == 0)
    if strategy.machines == 1 and _already_there(folder_state(output_dir), output_dir, loaded, console):
        return
    console.say("finetune: loading libraries ...")
    from finetune.backend.probe import prepare_libraries

    prepare_libraries(strategy.use_cpu)
    from finetune.job import assemble, prepare_plan  # torch is imported here: a wrong recipe has been answered by now

    plan = prepare_plan(loaded, strategy, console.say)
    job = assemble(plan, console.say)
    if strategy.machines > 1 and _already_there(_agreed_state(job, output_dir), output_dir, loaded, console):
        return
    _describe(console, job, output_dir)
    for line in advice(loaded, plan.batch, plan.max_grad_norm):
        console.say(line)
    files = RunFiles(output_dir, job.engine.rank == 0, _document(job))
    files.start(loaded.dump())
    try:
        summary = _train_and_export(job, files, console, output_dir)
    except BaseException as error:  # however it ends, run.json says so; then it goes on its way
        console.end_bar()
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        files.update(status="failed", exit_code=code, message=str(error))
        raise
    files.update(status="done", exit_code=0, summary=summary)
    job.engine.wait()
    _summarise(console, summary, output_dir)
    job.engine.close()


def _already_there(state: str, output_dir: Path, loaded: Loaded, console) -> bool:
    """True when the run is finished already (and said so). Raises UserError when the folder holds another."""
    if state == "finished":
        console.say(f"{output_dir} holds a finished run: nothing to do. For another run give another output_dir.")
        return True
    if state == "holds a run":
        raise UserError(
            f"{loaded.where('output_dir')}: output_dir {output_dir} holds a run that did not finish, and resuming is not"
            " available yet. Give another output_dir, or delete the folder to start over."
        )
    return False


def _agreed_state(job, output_dir: Path) -> str:
    """Rank 0's view of the output folder, on every rank: machines may not share the disk."""
    from finetune.report.files import folder_state

    states = ("free", "finished", "holds a run")
    (index,) = job.engine.total(states.index(folder_state(output_dir)) if job.engine.rank == 0 else 0)
    return states[int(index)]


def _train_and_export(job, files, console, output_dir: Path) -> dict:
    from finetune.backend.probe import device_peak_bytes, host_peak_bytes
    from finetune.export import export_model
    from finetune.loop import evaluate, train

    settings = job.plan.loaded.recipe
    started, total_tokens, last = time.time(), 0, None
    evaluations: list[tuple[int, float]] = []

    def run_evaluation(step: int) -> None:
        if job.evaluation_rows is not None and (not evaluations or evaluations[-1][0] != step):
            evaluations.append((step, evaluate(job)))
            files.log({"step": step, "eval_loss": evaluations[-1][1], "time": time.time()})
            console.say(f"held-out loss at step {step}: {evaluations[-1][1]:.4f}")

    run_evaluation(0)
    console.start_bar(job.schedule.planned_steps)
    for result in train(job):
        last, total_tokens = result, total_tokens + (result.tokens if result.applied else 0)
        speed = result.tokens / result.step_seconds
        row = metrics_of(result, job.schedule.batch.adapts) | {
            "total_tokens": total_tokens,
            "tokens_per_second": speed,
            "time": time.time(),
            "device_peak_bytes": device_peak_bytes(),
            "host_peak_bytes": host_peak_bytes(),
        }
        peak = row["device_peak_bytes"] or row["host_peak_bytes"]
        console.advance(result.step, result.loss, result.learning_rate, speed, peak)
        if not result.applied:
            console.say(f"window {result.window} skipped: gradient norm {result.grad_norm}; nothing was applied")
        if not result.applied or result.step % settings.logging.logging_steps == 0:
            files.log(row)
        if result.applied and result.step % settings.evaluation.eval_steps == 0:
            run_evaluation(result.step)
    console.end_bar()
    run_evaluation(last.step if last else 0)
    console.say("writing the model ...")
    model_dir = output_dir / "model"
    export_model(job.engine, job.plan.tokenizer, job.plan.facts.export_dtype, model_dir)
    seconds = time.time() - started
    return {
        "steps": last.step if last else 0,
        "windows": last.window if last else 0,
        "train_loss": last.loss if last else None,
        "eval_loss_first": evaluations[0][1] if evaluations else None,
        "eval_loss_last": evaluations[-1][1] if evaluations else None,
        "total_tokens": total_tokens,
        "seconds": seconds,
        "tokens_per_second": total_tokens / seconds,
        "device_peak_bytes": device_peak_bytes(),
        "host_peak_bytes": host_peak_bytes(),
        "model": str(model_dir),
    }


def metrics_of(result, adapts: bool) -> dict:
    """What one window leaves in metrics.jsonl; of an adaptive batch also what it follows, in trained tokens and per token."""
    noise = result.position.noise
    row = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "position"}
    if adapts:
        row |= {"gradient_noise_scale": noise.scale_tokens, "gradient_noise": noise.noise, "gradient_signal": noise.signal}
    return row


def _document(job) -> dict:
    from finetune.backend.probe import device_name

    plan = job.plan
    return {
        "status": "starting",
        "exit_code": None,
        "pid": os.getpid(),
        "argv": sys.argv,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": {"host": socket.gethostname(), "device": device_name(), "platform": platform.platform()},
        "plan": {
            "strategy": dataclasses.asdict(plan.strategy),
            "batch": dataclasses.asdict(plan.batch),
            "schedule": dataclasses.asdict(plan.schedule),
            "model": dataclasses.asdict(plan.facts) | job.description,
            "data": plan.data.summary,
            "max_grad_norm": plan.max_grad_norm,
            "scale_check": job.scale_check,
        },
    }


def describe_strategy(strategy: Strategy) -> str:
    """One line: engine, ranks, precision, offload, and where that was said."""
    parts = [{"single": "one process", "ddp": "data parallel (DDP)"}.get(strategy.engine, "")]
    if strategy.engine == "deepspeed":
        parts = [f"DeepSpeed ZeRO-{strategy.zero_stage}"]
        parts += [f"{what} on {where}" for what, where in (("optimizer", strategy.offload_optimizer),
                  ("parameters", strategy.offload_param)) if where != "none"]  # fmt: skip
    if strategy.engine != "single":
        parts.append(f"{strategy.ranks} rank{'s' if strategy.ranks != 1 else ''}")
    if strategy.machines > 1:
        parts.append(f"{strategy.machines} machines")
    precision = {"no": "float32", "bf16": "bf16 mixed precision", "fp16": "fp16 mixed precision"}
    return ", ".join([*parts, precision[strategy.mixed_precision]])


def _describe(console, job, output_dir: Path) -> None:
    from finetune.backend.probe import device_name

    plan, described = job.plan, job.description
    settings = plan.loaded.recipe
    data = plan.data.summary
    share = described["trained_parameters"] / described["parameters"]
    kind = "QLoRA" if settings.model.load_in_4bit else "LoRA" if settings.lora else "full fine-tuning"
    length = f"{plan.schedule.planned_steps} steps"
    if plan.schedule.total_rows is not None:
        epochs = settings.training.num_train_epochs
        length += f" ({epochs:g} epoch{'s' if epochs != 1 else ''} of {len(job.train_rows):,} rows)"
    share_of_run = plan.schedule.warmup_share
    warmup = f"{plan.schedule.warmup_steps} steps of warm-up" if share_of_run is None else f"warming up for {share_of_run:.4g} of the run"
    clipping = f"gradients clipped at {plan.max_grad_norm:g}" if plan.max_grad_norm else "gradients not clipped"
    console.facts({
        "model": f"{settings.model.name_or_path} ({plan.facts.architecture}, {described['parameters']:,} parameters)",
        "training": f"{kind}, {described['trained_parameters']:,} parameters trained ({share:.1%}), {described['optimizer']}",
        "data": (
            f"streamed, {data['trained_tokens'] / data['tokens']:.0%} of the first rows' tokens trained"
            if settings.data.streaming
            else f"{len(job.train_rows):,} rows, {data['trained_tokens']:,} of {data['tokens']:,} tokens trained"
        )
        + (f", {len(job.evaluation_rows):,} rows held out" if job.evaluation_rows else ""),
        "batch": batch_line(plan.loaded, plan.batch),
        "schedule": f"{length}, {learning_rate_line(plan.loaded, plan.batch)}, {settings.training.lr_scheduler_type}"
        f" after {warmup}, {clipping}",
        "runs on": f"{device_name()}: {describe_strategy(plan.strategy)}",
        "output": str(output_dir),
    })  # fmt: skip


def _summarise(console, summary: dict, output_dir: Path) -> None:
    from finetune.report.console import human_bytes, human_seconds

    rows = {"steps": f"{summary['steps']} in {human_seconds(summary['seconds'])},"
            f" {summary['tokens_per_second']:,.0f} trained tokens/s"}  # fmt: skip
    if summary["eval_loss_first"] is not None:
        first, last = summary["eval_loss_first"], summary["eval_loss_last"]
        rows["held-out loss"] = f"{first:.4f} -> {last:.4f} ({(last - first) / first:+.1%})"
    if summary["device_peak_bytes"]:
        rows["device peak"] = human_bytes(summary["device_peak_bytes"])
    rows["host peak"] = f"{human_bytes(summary['host_peak_bytes'])} (rank 0)"
    rows["model"] = summary["model"]
    rows["metrics"] = str(output_dir / "metrics.jsonl")
    console.say("done")
    console.facts(rows)
