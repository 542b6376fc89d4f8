"""Training: one window, one StepResult. Logging, evaluation and saving consume the results; none of it lives here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from finetune.batching import noise_scale
from finetune.batching.noise_scale import NoiseState
from finetune.batching.windows import Position, Window
from finetune.engine.gradient_norms import MicroBatchGradNorms
from finetune.errors import Diverged
from finetune.process import heartbeat
from finetune.process.heartbeat import row_numbers
from finetune.process.stop_signals import Requests
from finetune.training.job import Job

# windows whose gradient is not finite: a bad row is one, weights that left the numbers do not come back
SKIPPED_IN_A_ROW = 3
# the same with fp16's loss scaler, which halves its scale at each: far below any useful one by then
SCALED_IN_A_ROW = 50
EVALUATION_ROWS = 1024  # rows that are laid out together


@dataclass(frozen=True)
class StepResult:
    """What one window did. Losses and counts are over all ranks; `step` counts applied optimizer steps, this one
    included.
    """

    step: int
    window: int
    epoch: float
    loss: float
    grad_norm: float  # before clipping
    clip_ratio: float  # what clipping multiplied the gradient with
    learning_rate: float
    tokens: int
    input_tokens: int
    rows: int
    gradient_accumulation_steps: int
    step_seconds: float
    applied: bool
    position: Position  # behind this window
    stop: bool  # whether a rank was asked to stop; the same on every rank
    save: bool  # whether one was asked for a checkpoint


def train(
    job: Job, position: Position = Position(), requests: Callable[[], Requests] = Requests
) -> Iterator[StepResult]:
    """Train from `position` until the schedule ends, yielding after every window.

    `requests` tells what this rank was asked for: to stop, to save. Raises Diverged after a few windows in a row that
    are not finite; each is skipped on every rank.
    """
    job.engine.warm_up_ddp_buckets(job.collate(job.train_rows, ()))
    while not job.schedule.finished(position.step, position.applied_rows) and (window := job.next_window(position)):
        result = train_window(job, window, position, requests)
        position = result.position
        yield result
        _refuse_divergence(job, result, window)


def train_window(job: Job, window: Window, position: Position, requests: Callable[[], Requests]) -> StepResult:
    """One window: count its trained tokens over all ranks, then accumulate its micro-batches into one step."""
    started = time.perf_counter()
    engine = job.engine
    local_rows = job.local_rows(window)
    micro_batches = [job.collate(job.train_rows, rows) for rows in local_rows]
    learning_rate = job.schedule.learning_rate(position.step, position.applied_rows, position.noise.doublings)
    tokens, input_tokens = engine.all_reduce_sum(
        sum(batch.trained_tokens for batch in micro_batches), sum(batch.input_tokens for batch in micro_batches)
    )
    engine.set_lr(learning_rate)
    watch = engine.track_gradient_norms(tokens) if job.measures_noise(window) else None
    summed_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    for k, (rows, micro_batch) in enumerate(zip(local_rows, micro_batches, strict=True)):
        where = f"window {window.index + 1} (after step {position.step}), micro-batch {k + 1} of {len(micro_batches)}"
        heartbeat.update(where, rows, micro_batch.shape)
        seed_randomness(job.seed, window.index, k, engine.rank)
        summed_loss += engine.micro_step(micro_batch, denominator=tokens, last=k == len(micro_batches) - 1)
        if watch:
            watch.end_micro_batch(micro_batch.trained_tokens)
    noise = _measure_noise(job, position, watch, tokens, len(window.rows)) if watch else position.noise
    asked = requests()
    loss, stops, saves = engine.all_reduce_sum(summed_loss / tokens, asked.stop, asked.save)
    return StepResult(
        step=position.step + engine.applied,
        window=window.index + 1,
        epoch=job.epoch_after(window),
        loss=loss,
        grad_norm=engine.grad_norm(),
        clip_ratio=clip_ratio(engine.grad_norm(), job.plan.max_grad_norm),
        learning_rate=learning_rate,
        tokens=int(tokens),
        input_tokens=int(input_tokens),
        rows=len(window.rows),
        gradient_accumulation_steps=len(micro_batches),
        step_seconds=time.perf_counter() - started,
        applied=engine.applied,
        position=position.after(window, engine.applied, noise),
        stop=stops > 0,
        save=saves > 0,
    )


def _measure_noise(job: Job, position: Position, watch: MicroBatchGradNorms, tokens: float, rows: int) -> NoiseState:
    """The noise state behind a watched window, the same on every rank. A collective."""
    watch.close()
    engine = job.engine
    # the norm is summed too: a difference in its last bit would let the ranks choose different batches
    squares, micro_batches, norm = engine.all_reduce_sum(
        watch.weighted_squares, watch.micro_batches, engine.grad_norm() / engine.ranks
    )
    seen = noise_scale.measure(squares, round(micro_batches), tokens, rows, norm) if engine.applied else None
    sizes = job.schedule.batch
    if seen is None:
        return position.noise
    return noise_scale.adapt(
        position.noise, seen, job.batch.global_batch_rows, sizes.least_doublings, sizes.most_doublings
    )


def clip_ratio(grad_norm: float, limit: float) -> float:
    """min(1, limit / norm), what a gradient of this norm is multiplied with; 1 without a limit (0), 0 for a norm that
    is no finite number. Torch and DeepSpeed add 1e-6 to the norm, which is left out here."""
    if not limit or grad_norm <= limit:
        return 1.0
    return limit / grad_norm if math.isfinite(grad_norm) else 0.0


def evaluate(job: Job) -> float:
    """Mean loss per trained token over the whole evaluation set, all ranks, nats. Exact whatever the batches and
    ranks.
    """
    engine, source = job.engine, job.evaluation_rows
    assert source is not None, "asked only where there is evaluation data"
    summed_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    tokens = 0
    with engine.evaluating():
        for first in range(0, len(source), EVALUATION_ROWS):
            part = range(first, min(first + EVALUATION_ROWS, len(source)))
            # the same number of micro-batches on every rank, some perhaps empty
            for rows in job.batch.deal(part, source.lengths[first : part.stop].tolist())[engine.rank]:
                batch = job.collate(source, rows)
                heartbeat.update("evaluation", rows, batch.shape)
                summed_loss += engine.evaluate_batch(batch)
                tokens += batch.trained_tokens
    total_loss, total_tokens = engine.all_reduce_sum(summed_loss, tokens)
    return total_loss / total_tokens


def seed_randomness(seed: int, window: int, micro_batch: int, rank: int) -> None:
    """Dropout's randomness as a function of its place in the run, so that no generator state has to survive
    anything.
    """
    words = np.random.SeedSequence([seed, window, micro_batch, rank]).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def _refuse_divergence(job: Job, result: StepResult, window: Window) -> None:
    """A window that is not finite applies nothing and is skipped; several in a row, or a loss that was applied, end the
    run.
    """
    finite = math.isfinite(result.loss)
    most = SCALED_IN_A_ROW if job.engine.scales_loss else SKIPPED_IN_A_ROW
    if (finite or not result.applied) and result.position.skipped_in_a_row < most:
        return
    raise Diverged(
        f"training diverged at step {result.step}: {result.position.skipped_in_a_row} consecutive updates skipped,"
        f" loss or gradient not finite (loss {result.loss}, norm {result.grad_norm}). Last batch: {row_list(window)}."
        " No model was exported. Lower training.learning_rate, warm up longer, or look at the rows."
    )


def row_list(window: Window) -> str:
    """The rows of a window in words, the first 16."""
    return f"training rows {row_numbers(window.rows)}, counted from 0"
