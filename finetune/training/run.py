"""A training run inside its process: recipe -> plan -> job -> steps -> exported model, and what it leaves in the
folder.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import sys
from pathlib import Path

from finetune.checkpoint.disk import check_disk
from finetune.checkpoint.identity import flat, versions
from finetune.checkpoint.progress import Progress
from finetune.engine.devices import device_name, host_bytes
from finetune.errors import StopRequested
from finetune.launch.preflight import advice
from finetune.launch.strategy import Strategy
from finetune.memory.formulas import checkpoint_bytes, exported_bytes
from finetune.model.outline import weights_beforehand
from finetune.process import exit_status, heartbeat
from finetune.process.run_lock import acquire
from finetune.process.stop_signals import STOP_FILE, stop_signals
from finetune.process.watchdog import watching
from finetune.recipe.load import LoadedRecipe
from finetune.report import redact, trackers
from finetune.report.console import Console
from finetune.report.run_folder import RunFiles, is_finished
from finetune.training import banner, forecast
from finetune.training.export import export_model
from finetune.training.job import Job, JobSpec, assemble, prepare
from finetune.training.loop import run_loop, summary_of
from finetune.training.micro_batch_trial import try_micro_batch
from finetune.training.out_of_memory import explained
from finetune.training.resume import begin, facts_of


def run(loaded: LoadedRecipe, strategy: Strategy, output_dir: Path, console: Console) -> None:
    """Train a recipe in this process, one of the ranks of a launch (or alone), to the exported model.

    Raises FinetuneError for every expected end.
    """
    plan, expected, expectation = _planned(loaded, strategy, output_dir, console)
    with explained(plan):
        job = assemble(plan, console.say, measure=True)
    if strategy.machines > 1 and loaded.recipe.checkpoint.resume != "never" and _finished(job, output_dir):
        console.say(f"{output_dir} holds a finished run: nothing to do. For another run give another output_dir.")
        return
    console.facts(banner.facts(job, output_dir, expectation))
    for line in advice(loaded, plan.batch, plan.max_grad_norm):
        console.say(line)
    job.engine.on_rank_0(lambda: _claim(output_dir, console))
    facts = facts_of(job)
    progress = begin(job, console, output_dir, facts)
    document = _document(job) | {"resumed_from_step": progress.position.step or None, "memory": {"predicted": expected}}
    tracking = _start_trackers(job, console, output_dir)
    files = RunFiles(output_dir, job.engine.rank == 0, document, also=tracking.log)
    files.start(
        loaded.dump(), progress.position.window, [step for step, _ in progress.evaluations], job.engine.configuration()
    )
    summary, memory = _to_the_end(job, files, console, facts, progress, expected, tracking)
    files.update(status="done", exit_code=0, summary=summary, memory=memory)
    job.engine.barrier()
    console.say("done")
    console.facts(banner.results(summary, output_dir, forecast.comparison_lines(memory)))
    tracking.finish()  # last: it may wait for somebody's service
    job.engine.close()


def _check_disk(plan: JobSpec, output_dir: Path, console: Console) -> None:
    """Raises UserError where no checkpoint fits on the disk. Not asked where a model's parameters are not known yet."""
    loaded, weights = plan.loaded, weights_beforehand(plan.loaded, plan.facts)
    if weights is not None:
        one = checkpoint_bytes(weights, loaded.recipe.training.optim, plan.strategy)
        check_disk(loaded, output_dir, one, exported_bytes(weights, plan.facts.export_dtype), console.say)


def _planned(
    loaded: LoadedRecipe, strategy: Strategy, output_dir: Path, console: Console
) -> tuple[JobSpec, dict | None, str]:
    """The plan, what it is expected to take (for run.json), and that in a line: all that is known before weights are
    read.

    Raises UserError where host, disk or device surely have too little.
    """
    plan = prepare(loaded, strategy, console.say)
    known = forecast.forecast(plan)
    if not isinstance(known, str):
        forecast.refuse_what_cannot_fit(plan, known[0], console.say)
    _check_disk(plan, output_dir, console)
    if plan.chosen:
        with explained(plan):
            plan = try_micro_batch(plan, console.say)
        known = forecast.forecast(plan)
    if isinstance(known, str):
        return plan, None, known
    found, shape = known
    expected = forecast.predicted(found, shape, plan.strategy.engine, host_bytes())
    return plan, expected, forecast.expectation_line(found, shape)


def _claim(output_dir: Path, console: Console) -> None:
    """Hold the folder until this process ends; what asked the run before to stop does not ask this one. Raises
    UserError.
    """
    acquire(output_dir, console.say)
    (output_dir / STOP_FILE).unlink(missing_ok=True)


def _start_trackers(job: Job, console: Console, output_dir: Path) -> trackers.Trackers:
    """The recipe's trackers on rank 0, with the resolved recipe as their settings."""
    recipe = job.plan.loaded.recipe
    settings = {
        key: value if isinstance(value, (bool, int, float)) else str(value)
        for key, value in flat(redact.tree(recipe.model_dump(mode="json", exclude_none=True))).items()
    }
    names = recipe.logging.report_to if job.engine.rank == 0 else []
    return trackers.start(names, output_dir / "trackers", output_dir.name, settings, console.say)


def _finished(job: Job, output_dir: Path) -> bool:
    """Rank 0's view of the output folder, on every rank: machines may not share the disk."""
    return bool(job.engine.broadcast_object(is_finished(output_dir)))


def _to_the_end(
    job: Job,
    files: RunFiles,
    console: Console,
    facts: dict,
    progress: Progress,
    expected: dict | None,
    tracking: trackers.Trackers,
) -> tuple[dict, dict]:
    """(summary, memory) of the run; however it ends, run.json says so, and then it goes on its way."""
    try:
        with explained(job.plan, job.engine):
            return _train_and_export(job, files, console, facts, progress), forecast.compared(
                expected, job.engine.meter
            )
    except BaseException as error:
        console.end_bar()
        end = exit_status.resolve(error)[1]
        files.update(
            status="stopped" if end.code == StopRequested.exit_code else "failed",
            exit_code=end.code,
            message=end.message,
            memory=forecast.compared(expected, job.engine.meter),
        )
        tracking.finish()
        raise


def _train_and_export(job: Job, files: RunFiles, console: Console, facts: dict, progress: Progress) -> dict:

    model_dir = files.output_dir / "model"
    seconds = job.plan.loaded.recipe.training.step_timeout_seconds
    with (
        stop_signals(files.output_dir) as requests,
        watching(seconds, lambda code, message: files.update(status="failed", exit_code=code, message=message)),
    ):
        progress = run_loop(job, files, console, progress, facts, requests)
        heartbeat.update("writing the model", slow=True)
        console.say("writing the model ...")
        export_model(job.engine, job.plan.tokenizer, job.plan.facts.export_dtype, model_dir)
    return summary_of(job, progress, model_dir)


def _document(job: Job) -> dict:

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
