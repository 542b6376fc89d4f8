"""The training loop: steps, and beside them logging, evaluation and saving."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from finetune.batching.windows import Position
from finetune.checkpoint import checkpoint
from finetune.checkpoint.progress import Progress
from finetune.engine.devices import device_peak_bytes, host_peak_bytes
from finetune.errors import Diverged, StopRequested
from finetune.memory.formulas import checkpoint_bytes
from finetune.model.parameters import weights_of
from finetune.process import heartbeat
from finetune.process.stop_signals import SAVE_FILE, Requests
from finetune.report.console import Console
from finetune.report.run_folder import CHECKPOINTS, RunFiles
from finetune.training import loss_spike
from finetune.training.job import Job
from finetune.training.step import StepResult, evaluate, row_list, train

NOT_LOGGED = ("position", "stop", "save")  # of a StepResult: for the loop alone


def run_loop(
    job: Job, files: RunFiles, console: Console, progress: Progress, facts: dict, requests: Callable[[], Requests]
) -> Progress:
    """Train from `progress` to the end and return the progress there.

    `requests` tells what this rank was asked for: to stop, to save. Raises StopRequested when one was asked to stop,
    after saving, and Diverged.
    """
    training = job.plan.loaded.recipe.training
    started = time.time() - progress.seconds
    save_at = _next_save(job, progress.position.step)
    if not progress.evaluations:
        progress = _evaluated(job, files, console, progress)
    console.start_bar(job.schedule.planned_steps, progress.position.step)
    before: deque[Position] = deque(maxlen=loss_spike.IN_A_ROW)  # where the last applied windows began
    for result in train(job, progress.position, requests):
        if result.applied:
            before.append(progress.position)
        progress = _after(progress, result, time.time() - started)
        _log(job, files, console, result, progress)
        if result.applied and not math.isfinite(result.loss):
            continue  # never saved: train() ends the run
        outliers = loss_spike.consecutive_outliers(progress.recent_losses)
        if outliers == loss_spike.IN_A_ROW and training.stop_on_loss_spike and result.applied:
            raise Diverged(_spike(job, progress, before))
        progress = _evaluate_if_due(job, files, console, progress, result)
        save_at = _save_if_due(job, files, console, progress, facts, result, save_at, outliers)
    console.end_bar()
    progress = _evaluated(job, files, console, dataclasses.replace(progress, seconds=time.time() - started))
    if job.engine.all_reduce_sum(requests().stop)[0]:
        raise StopRequested(_stopped(progress.position.step, "is the last; the model is still to be written"))
    return progress


def _after(progress: Progress, result: StepResult, seconds: float) -> Progress:
    """The progress behind this window, `seconds` into the run."""
    losses = progress.recent_losses
    return dataclasses.replace(
        progress,
        position=result.position,
        train_loss=result.loss,
        seconds=seconds,
        total_tokens=progress.total_tokens + result.tokens * result.applied,
        recent_losses=loss_spike.remember(losses, result.loss) if result.applied else losses,
    )


def _evaluate_if_due(job: Job, files: RunFiles, console: Console, progress: Progress, result: StepResult) -> Progress:
    """The progress with an evaluation in it where one is due; the last step's comes after the loop."""
    every = job.plan.loaded.recipe.evaluation.eval_steps
    if result.applied and result.step % every == 0 and not _finished(job, result):
        return _evaluated(job, files, console, progress)
    return progress


def _save_if_due(
    job: Job,
    files: RunFiles,
    console: Console,
    progress: Progress,
    facts: dict,
    result: StepResult,
    save_at: int,
    outliers: int,
) -> int:
    """Save where it is due or asked for; the step at which the next save is due.

    Raises StopRequested after the save that a stop asks for. While the last losses are `outliers`, nothing is
    saved over the checkpoint from before them.
    """
    step, finished = result.step, _finished(job, result)
    due = result.applied and step >= save_at and not outliers
    if not (finished or result.stop or result.save or due):
        return save_at
    root = files.output_dir / CHECKPOINTS
    if result.stop:
        console.say("asked to stop: saving ...")
    problem = _save(job, root, progress, facts)
    # after a failure: soon again, the old checkpoint is still there
    every = job.plan.loaded.recipe.checkpoint.save_steps
    save_at = step + max(1, every // 10) if problem else _next_save(job, step)
    if problem:
        again = "" if finished or result.stop else f" Training continues; the next attempt is at step {save_at}."
        console.say(f"warning: no checkpoint of step {step}: {problem}.{again}")
    if result.stop:
        console.end_bar()
        raise StopRequested(_stopped(step, f"could not be saved: {problem}" if problem else f"was saved to {root}"))
    if result.save:
        (files.output_dir / SAVE_FILE).unlink(missing_ok=True)
        console.say(f"asked to save: {'see the warning' if problem else f'step {step} is in {root}'}")
    return save_at


def _next_save(job: Job, step: int) -> int:
    every = job.plan.loaded.recipe.checkpoint.save_steps
    return (step // every + 1) * every


def _finished(job: Job, result: StepResult) -> bool:
    return job.schedule.finished(result.step, result.position.applied_rows)


def _stopped(step: int, what: str) -> str:
    return f"stopped on request after step {step}, which {what}. The same command resumes from the newest checkpoint."


def _spike(job: Job, progress: Progress, before: Sequence[Position]) -> str:
    losses = progress.recent_losses
    usual, spike = losses[: -loss_spike.IN_A_ROW], losses[-loss_spike.IN_A_ROW :]
    first = job.next_window(before[0])
    assert first is not None, "it was taken once"
    return (
        f"loss spike: steps {progress.position.step - loss_spike.IN_A_ROW + 1} to {progress.position.step} have losses"
        f" {', '.join(f'{loss:.4g}' for loss in spike)}; median of the {len(usual)} steps before:"
        f" {median(usual):.4g}; a loss above {loss_spike.limit(usual):.4g} counts as a spike. Its first batch:"
        f" {row_list(first)}. The newest checkpoint is from before the spike. Look at the rows, or resume with a lower"
        " training.learning_rate and checkpoint.allow_changed=[training.learning_rate];"
        " training.stop_on_loss_spike=false trains on."
    )


def _save(job: Job, root: Path, progress: Progress, facts: dict) -> str:
    heartbeat.update(f"saving step {progress.position.step}", slow=True)
    recipe, weights = job.plan.loaded.recipe, weights_of(job.engine.inner_model())
    needed = checkpoint_bytes(weights, recipe.training.optim, job.plan.strategy)
    limit, keep_best = recipe.checkpoint.save_total_limit, recipe.checkpoint.keep_best
    return checkpoint.save(job.engine, root, progress, facts, limit, keep_best, needed)


def _evaluated(job: Job, files: RunFiles, console: Console, progress: Progress) -> Progress:
    """The progress with the held-out loss at this step in it, measured unless it was."""
    step = progress.position.step
    if job.evaluation_rows is None or any(step == there for there, _ in progress.evaluations):
        return progress
    loss = evaluate(job)
    files.log({"step": step, "eval_loss": loss, "time": time.time()})
    console.say(f"held-out loss at step {step}: {loss:.4f}")
    return dataclasses.replace(progress, evaluations=(*progress.evaluations, (step, loss)))


def _log(job: Job, files: RunFiles, console: Console, result: StepResult, progress: Progress) -> None:
    speed = result.tokens / result.step_seconds
    row = metrics_of(result, job.schedule.batch.adapts) | {
        "total_tokens": progress.total_tokens,
        "tokens_per_second": speed,
        "time": time.time(),
        "device_peak_bytes": device_peak_bytes(),
        "host_peak_bytes": host_peak_bytes(),
    }
    peak = row["device_peak_bytes"] or row["host_peak_bytes"]
    console.advance(result.step, result.loss, result.learning_rate, speed, peak)
    if not result.applied:
        console.say(
            f"update {result.window} skipped: gradient is not finite (loss {result.loss}, norm {result.grad_norm});"
            " weights unchanged"
        )
    if not result.applied or result.step % job.plan.loaded.recipe.logging.logging_steps == 0:
        files.log(row)


def metrics_of(result: StepResult, adapts: bool) -> dict:
    """What one window leaves in metrics.jsonl; of an adaptive batch also what it follows, in trained tokens and per
    token.
    """
    noise = result.position.noise
    row = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in NOT_LOGGED}
    if adapts:
        row |= {
            "gradient_noise_scale": noise.scale_tokens,
            "gradient_noise": noise.noise,
            "gradient_signal": noise.signal,
        }
    return row


def summary_of(job: Job, progress: Progress, model_dir: Path) -> dict:
    """The end-of-run figures for run.json and the terminal. `seconds` and tokens are over all processes of the run."""
    evaluations = progress.evaluations
    return {
        "steps": progress.position.step,
        "windows": progress.position.window,
        "train_loss": progress.train_loss,
        "eval_loss_first": evaluations[0][1] if evaluations else None,
        "eval_loss_last": evaluations[-1][1] if evaluations else None,
        "total_tokens": progress.total_tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.total_tokens / progress.seconds if progress.seconds else 0.0,
        "device_peak_bytes": device_peak_bytes(),
        "host_peak_bytes": host_peak_bytes(),
        "model": str(model_dir),
    }
