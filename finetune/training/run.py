"""A training run inside its process: recipe -> plan -> job -> steps -> exported model, and what it leaves in the
folder.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import StopRequested, UserError
from finetune.launch.environment import from_environment, is_launched
from finetune.launch.launcher_command import check_ranks_asked_for, launched_by
from finetune.launch.preflight import advice, batch_line, learning_rate_line, settle
from finetune.launch.strategy import Strategy
from finetune.process import exit_status
from finetune.process.exit_status import guarded
from finetune.process.heartbeat import at
from finetune.process.run_lock import acquire
from finetune.process.stop_signals import STOP_FILE, follow_launcher, listening
from finetune.process.watchdog import watching
from finetune.recipe.load import load_recipe
from finetune.report import redact
from finetune.report.run_folder import refuse_links_out


def run_rank(argv: Sequence[str]) -> None:
    """The trainer process: train the recipe in `argv` and exit with the status that says how it ended. Does not
    return.
    """

    def body() -> None:
        if not argv or argv[0].startswith("-"):
            raise UserError(
                f"train.py: expected a recipe first, found {' '.join(argv) or 'nothing'}. Usage: accelerate"
                " launch finetune/train.py recipe.yaml [key=value ...]"
            )
        train_in_place(argv[0], list(argv[1:]))

    code = guarded(body)
    if code and is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter's own end may wait for ranks that wait for this one
    sys.exit(code)


def train_in_place(recipe_path: str, overrides: Sequence[str]) -> None:
    """Train in this process, one of the ranks of a launch (or alone). Raises FinetuneError for every expected end."""
    loaded = load_recipe(recipe_path, overrides)
    ranks_asked, launch_file = launched_by()
    strategy = from_environment(os.environ, launch_file)
    check_ranks_asked_for(strategy, ranks_asked)
    if is_launched():
        follow_launcher()
    settle(loaded, strategy)  # for its refusals, before seconds go by with imports
    output_dir = Path(loaded.recipe.output_dir).absolute()
    from finetune.report.console import Console
    from finetune.report.run_folder import RunFiles, is_finished

    refuse_links_out(output_dir)
    console = Console(enabled=int(os.environ.get("RANK", "0")) == 0)
    again = loaded.recipe.checkpoint.resume == "never"
    if strategy.machines == 1 and not again and is_finished(output_dir):
        console.say(f"{output_dir} holds a finished run: nothing to do. For another run give another output_dir.")
        return
    console.say("finetune: loading libraries ...")
    from finetune.engine.libraries import prepare_libraries

    prepare_libraries(strategy.use_cpu, loaded.recipe.training.deterministic)
    from finetune.training import forecast as account
    from finetune.training.job import assemble  # torch is imported here: a wrong recipe has been answered by now
    from finetune.training.out_of_memory import explained
    from finetune.training.resume import begin, facts_of

    plan, expected, expectation = _planned(loaded, strategy, output_dir, console)
    with explained(plan):
        job = assemble(plan, console.say, measure=True)
    if strategy.machines > 1 and not again and _finished(job, output_dir):
        console.say(f"{output_dir} holds a finished run: nothing to do. For another run give another output_dir.")
        return
    _describe(console, job, output_dir, expectation)
    for line in advice(loaded, plan.batch, plan.max_grad_norm):
        console.say(line)
    job.engine.on_rank_0(lambda: _claim(output_dir, console))
    facts = facts_of(job)
    progress = begin(job, console, output_dir, facts)
    document = _document(job) | {"resumed_from_step": progress.position.step or None, "memory": {"predicted": expected}}
    trackers = _start_trackers(job, console, output_dir)
    files = RunFiles(output_dir, job.engine.rank == 0, document, also=trackers.log)
    files.start(
        loaded.dump(), progress.position.window, [step for step, _ in progress.evaluations], job.engine.configuration()
    )
    summary, memory = _to_the_end(job, files, console, facts, progress, expected, trackers)
    files.update(status="done", exit_code=0, summary=summary, memory=memory)
    job.engine.barrier()
    _summarise(console, summary, output_dir, account.comparison_lines(memory))
    trackers.finish()  # last: it may wait for somebody's service
    job.engine.close()


def _check_room(plan, output_dir: Path, console) -> None:
    """Host memory and disk, before weights are read. Raises UserError where either cannot be enough."""
    from finetune.engine.devices import has_accelerator
    from finetune.process import host_memory
    from finetune.training.job import outlined_weights

    loaded, dtype, weights = plan.loaded, plan.facts.export_dtype, outlined_weights(plan)
    # of the base model; 0 where nobody can say
    parameters = sum(w.elements for w in weights.all if loaded.recipe.lora is None or not w.trained) if weights else 0
    trained = 0 if loaded.recipe.lora else parameters
    need = host_memory.host_need(loaded, plan.strategy, parameters, dtype, use_cpu=not has_accelerator())
    host_memory.check_host(loaded, plan.strategy, need, console.say)
    host_memory.check_disk(loaded, output_dir, trained, trained * host_memory.DTYPE_BYTES[dtype], console.say)


def _planned(loaded, strategy: Strategy, output_dir: Path, console) -> tuple:
    """The plan, what it is expected to take (for run.json), and that in a line: all that is known before weights are
    read.

    Raises UserError where host, disk or device surely have too little.
    """
    from finetune.engine.devices import host_bytes
    from finetune.training import forecast as account
    from finetune.training.job import forecast, prepare_plan
    from finetune.training.micro_batch_trial import confirmed
    from finetune.training.out_of_memory import explained

    plan = prepare_plan(loaded, strategy, console.say)
    _check_room(plan, output_dir, console)
    if plan.chosen:
        with explained(plan):
            plan = confirmed(plan, console.say)
    known = forecast(plan)
    if isinstance(known, str):
        return plan, None, known
    found, shape = known
    if warning := account.refuse_what_cannot_fit(plan.loaded, found):
        console.say(warning)
    return (
        plan,
        account.predicted(found, shape, plan.strategy.engine, host_bytes()),
        account.expectation_line(found, shape),
    )


def _claim(output_dir: Path, console) -> None:
    """Hold the folder until this process ends; what asked the run before to stop does not ask this one. Raises
    UserError.
    """
    acquire(output_dir, console.say)
    (output_dir / STOP_FILE).unlink(missing_ok=True)


def _start_trackers(job, console, output_dir: Path):
    """The recipe's trackers on rank 0, with the resolved recipe as their settings."""
    from finetune.checkpoint.identity import flat
    from finetune.report.trackers import start

    recipe = job.plan.loaded.recipe
    settings = {
        key: value if isinstance(value, (bool, int, float)) else str(value)
        for key, value in flat(redact.tree(recipe.model_dump(mode="json", exclude_none=True))).items()
    }
    names = recipe.logging.report_to if job.engine.rank == 0 else []
    return start(names, output_dir / "trackers", output_dir.name, settings, console.say)


def _finished(job, output_dir: Path) -> bool:
    """Rank 0's view of the output folder, on every rank: machines may not share the disk."""
    from finetune.report.run_folder import is_finished

    return bool(job.engine.broadcast_object(is_finished(output_dir)))


def _to_the_end(job, files, console, facts: dict, progress, expected: dict | None, trackers) -> tuple[dict, dict]:
    """(summary, memory) of the run; however it ends, run.json says so, and then it goes on its way."""
    from finetune.training.forecast import compared
    from finetune.training.out_of_memory import explained

    try:
        with explained(job.plan, job.engine):
            return _train_and_export(job, files, console, facts, progress), compared(expected, job.engine.meter)
    except BaseException as error:
        console.end_bar()
        end = exit_status.settle(error)[1]
        files.update(
            status="stopped" if end.code == StopRequested.exit_code else "failed",
            exit_code=end.code,
            message=end.message,
            memory=compared(expected, job.engine.meter),
        )
        trackers.finish()
        raise


def _train_and_export(job, files, console, facts: dict, progress) -> dict:
    from finetune.model.save import export_model
    from finetune.training.loop import follow, summary_of

    model_dir = files.output_dir / "model"
    seconds = job.plan.loaded.recipe.training.step_timeout_seconds
    with (
        listening(files.output_dir) as wishes,
        watching(seconds, lambda code, message: files.update(status="failed", exit_code=code, message=message)),
    ):
        progress = follow(job, files, console, progress, facts, wishes)
        at("writing the model", slow=True)
        console.say("writing the model ...")
        export_model(job.engine, job.plan.tokenizer, job.plan.facts.export_dtype, model_dir)
    return summary_of(job, progress, model_dir)


def _document(job) -> dict:
    from finetune.checkpoint.identity import versions
    from finetune.engine.devices import device_name

    plan = job.plan
    return {
        "status": "starting",
        "exit_code": None,
        "pid": os.getpid(),
        "argv": sys.argv,
        "versions": {"python": platform.python_version()} | versions(),
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
        parts += [
            f"{what} on {where}"
            for what, where in (("optimizer", strategy.offload_optimizer), ("parameters", strategy.offload_param))
            if where != "none"
        ]
    if strategy.engine != "single":
        parts.append(f"{strategy.ranks} rank{'s' if strategy.ranks != 1 else ''}")
    if strategy.machines > 1:
        parts.append(f"{strategy.machines} machines")
    precision = {"no": "float32", "bf16": "bf16 mixed precision", "fp16": "fp16 mixed precision"}
    return ", ".join([*parts, precision[strategy.mixed_precision]])


def _describe(console, job, output_dir: Path, expectation: str) -> None:
    from finetune.engine.devices import device_name

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
    warmup = (
        f"{plan.schedule.warmup_steps} steps of warm-up"
        if share_of_run is None
        else f"warming up for {share_of_run:.4g} of the run"
    )
    clipping = f"gradients clipped at {plan.max_grad_norm:g}" if plan.max_grad_norm else "gradients not clipped"
    console.facts(
        {
            "model": (
                f"{settings.model.name_or_path} ({plan.facts.architecture}, {described['parameters']:,} parameters)"
            ),
            "training": (
                f"{kind}, {described['trained_parameters']:,} parameters trained ({share:.1%}),"
                f" {described['optimizer']}"
            ),
            "data": (
                (
                    f"streamed, {data['trained_tokens'] / data['tokens']:.0%} of the first rows' tokens trained"
                    if settings.data.streaming
                    else (
                        f"{len(job.train_rows):,} rows, {data['trained_tokens']:,} of {data['tokens']:,} tokens trained"
                    )
                )
                + (f", {len(job.evaluation_rows):,} rows held out" if job.evaluation_rows else "")
            ),
            "batch": batch_line(plan.loaded, plan.batch),
            "schedule": (
                f"{length}, {learning_rate_line(plan.loaded, plan.batch)}, {settings.training.lr_scheduler_type}"
                f" after {warmup}, {clipping}"
            ),
            "runs on": f"{device_name()}: {describe_strategy(plan.strategy)}",
            "memory": expectation,
            "output": str(output_dir),
        }
    )


def _summarise(console, summary: dict, output_dir: Path, memory: dict[str, str]) -> None:
    from finetune.report.text import human_seconds

    rows = {
        "steps": (
            f"{summary['steps']} in {human_seconds(summary['seconds'])},"
            f" {summary['tokens_per_second']:,.0f} trained tokens/s"
        )
    }
    if summary["eval_loss_first"] is not None:
        first, last = summary["eval_loss_first"], summary["eval_loss_last"]
        rows["held-out loss"] = f"{first:.4f} -> {last:.4f} ({(last - first) / first:+.1%})"
    rows |= memory
    rows["model"] = summary["model"]
    rows["metrics"] = str(output_dir / "metrics.jsonl")
    console.say("done")
    console.facts(rows)
