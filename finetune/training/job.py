"""One job, assembled once for training, verification and comparison: engine, summed-loss module, data, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from finetune.batching.batch_size import batch_schedule
from finetune.batching.learning_rate import Schedule, lr_scaling, warmup_steps_of
from finetune.batching.plan import BatchPlan
from finetune.batching.windows import (
    Position,
    Window,
    epoch_rows,
    next_window,
    planned_windows,
    stream_window,
)
from finetune.data import collate
from finetune.data.prepare import PreparedData
from finetune.data.prepare import prepare as prepare_data
from finetune.data.stream import StreamRows, open_stream
from finetune.data.token_cache import TokenRows
from finetune.engine.devices import flash_device, has_accelerator
from finetune.engine.engine import Engine
from finetune.engine.optimizer import make_optimizer, optimizer_name
from finetune.engine.scale_check import check_scale, start_probe_engine
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.errors import UserError
from finetune.launch import preflight
from finetune.launch.strategy import Strategy
from finetune.memory.micro_batch import choose_micro_batch
from finetune.model.facts import ModelFacts, read_facts
from finetune.model.load import load_model, objective_for
from finetune.model.outline import weights_beforehand
from finetune.model.parameters import frozen_type, parameter_counts
from finetune.model.proofs import packing_kernel, why_not_isolated, with_fused_loss
from finetune.model.tokenizer import load_tokenizer, needed_vocabulary, padding_id
from finetune.objectives.micro_batch import MicroBatch
from finetune.objectives.sft import SummedLoss
from finetune.process.watchdog import ranks_wait
from finetune.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class JobSpec:
    """What is known before a weight is read: batch arithmetic, schedule, model facts, tokenised data."""

    loaded: LoadedRecipe
    strategy: Strategy
    batch: BatchPlan
    max_grad_norm: float
    facts: ModelFacts
    tokenizer: object
    data: PreparedData
    schedule: Schedule
    chosen: bool = False  # whether the micro-batch was chosen by memory, and is to be confirmed on the device


@dataclass(frozen=True)
class Job:
    """A plan on a running engine."""

    plan: JobSpec
    engine: Engine
    description: dict
    scale_check: str = ""  # what the start-up check saw

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def batch(self) -> BatchPlan:
        return self.plan.batch

    @property
    def seed(self) -> int:
        return self.plan.loaded.recipe.training.seed

    @property
    def train_rows(self) -> TokenRows | StreamRows:
        return self.plan.data.train

    @property
    def evaluation_rows(self) -> TokenRows | None:
        return self.plan.data.evaluation

    def next_window(self, position: Position) -> Window | None:
        """The window at this position of the run; None when its rows are used up, which never happens with
        max_steps.
        """
        training = self.plan.loaded.recipe.training
        epochs = training.num_train_epochs if training.max_steps is None else None
        rows = self.schedule.batch_rows(position.step, position.applied_rows, position.noise.doublings)
        if self.plan.loaded.recipe.data.streaming:
            return stream_window(position, rows)
        return next_window(position, self.train_row_count, rows, self.seed, math.inf if epochs is None else epochs)

    @property
    def train_row_count(self) -> int:
        """Rows of the training data; not for a stream, whose length nobody knows."""
        assert not isinstance(self.train_rows, StreamRows)
        return len(self.train_rows)

    def measures_noise(self, window: Window) -> bool:
        """Whether this window's gradients are watched for the noise scale."""
        return self.schedule.batch.adapts and window.index % self.schedule.batch.measure_every == 0

    def epoch_after(self, window: Window) -> float:
        """Passes over the training rows when `window` is done; 0 for a stream, whose length nobody knows."""
        if self.plan.loaded.recipe.data.streaming:
            return 0.0
        return window.epoch + (window.first_row + len(window.rows)) / self.train_row_count

    def local_rows(self, window: Window) -> list[tuple[int, ...]]:
        """The rows of this rank's micro-batches of a window; equally many on every rank, some perhaps empty.

        Where the noise is measured, micro-batches are samples of the window: at least two, not sorted by length.
        """
        lengths, measured = [self.train_rows.length(i) for i in window.rows], self.measures_noise(window)
        return self.batch.deal(window.rows, lengths, fewest=1 + measured, in_order=measured)[self.engine.rank]

    def collate(self, source: TokenRows | StreamRows, rows: tuple[int, ...]) -> MicroBatch:
        """One micro-batch of these rows of a source; an empty one for no rows."""
        padding = padding_id(self.plan.tokenizer, self.plan.facts.vocabulary)
        make = collate.padded if self.batch.row_tokens is None else collate.packed
        return make([source.row(i) for i in rows], padding)


def prepare(loaded: LoadedRecipe, strategy: Strategy, say: Callable[[str], None]) -> JobSpec:
    """Everything that can be wrong before weights are read. No process group: every rank calls it by itself.

    Raises UserError.
    """
    # where no GPU is found the CPU was not asked for, but it is what will run
    settled = preflight.resolve(loaded, replace(strategy, use_cpu=strategy.use_cpu or not has_accelerator()))
    batch, max_grad_norm = settled.batch, settled.max_grad_norm
    facts = read_facts(loaded)
    tokenizer = load_tokenizer(loaded)
    prepared = (open_stream if loaded.recipe.data.streaming else prepare_data)(loaded, tokenizer, say)
    facts = check_rows(loaded, strategy, facts, tokenizer, prepared)
    facts, batch = fastest(loaded, settled.strategy, facts, batch, say)
    rows = 0 if isinstance(prepared.train, StreamRows) else len(prepared.train)  # a stream has max_steps
    schedule = make_schedule(loaded, batch, rows)
    if chosen := batch.open:
        batch = choose_micro_batch(replace(settled, batch=batch), facts, prepared, say)
    return JobSpec(loaded, strategy, batch, max_grad_norm, facts, tokenizer, prepared, schedule, chosen)


def fastest(
    loaded: LoadedRecipe, strategy: Strategy, facts: ModelFacts, batch: BatchPlan, say: Callable[[str], None]
) -> tuple[ModelFacts, BatchPlan]:
    """The facts with the fastest ways that this model is proved to go: the attention kernel for packed rows where the
    recipe packs, else the batch of padded rows and a line that says why; and a head that computes the loss itself.

    Raises UserError where padded rows are too few for what the recipe asks.
    """
    facts = with_fused_loss(loaded, strategy, facts)
    if batch.row_tokens is None:
        return facts, batch
    device = flash_device()
    kernel = packing_kernel(loaded, strategy, device)
    if why := why_not_isolated(loaded, kernel, device):
        say(
            f"{loaded.location('data.packing')}: data.packing is true, but {facts.architecture} cannot keep packed rows"
            f" apart: {why}. Its rows are padded: the same mathematics, slower."
        )
        padded = replace(batch, row_tokens=None)
        if problems := preflight.too_few_to_measure(loaded, padded):
            raise UserError(problems)
        return facts, padded
    return replace(facts, attention=kernel), batch


def check_rows(
    loaded: LoadedRecipe,
    strategy: Strategy,
    facts: ModelFacts,
    tokenizer: PreTrainedTokenizerBase,
    prepared: PreparedData,
) -> ModelFacts:
    """The facts of the model that takes these rows: its vocabulary grows where their tokens need it.

    Raises UserError where the rows hold tokens or positions that the model cannot have.
    """
    vocabulary = needed_vocabulary(loaded, strategy, facts, tokenizer, prepared.summary["max_token_id"])
    longest = max(int(rows.lengths.max()) for rows in (prepared.train, prepared.evaluation) if rows is not None)
    if facts.max_positions is not None and longest > facts.max_positions:
        raise UserError(
            f"{loaded.location('data.max_length')}: data.max_length lets rows of {longest} tokens through, but the"
            f" model has {facts.max_positions} positions. Use max_length {facts.max_positions} or less."
        )
    return replace(facts, vocabulary=vocabulary)


def make_schedule(loaded: LoadedRecipe, batch: BatchPlan, rows: int) -> Schedule:
    """The recipe's schedule of batch and learning rate over a training set of `rows` rows."""
    training = loaded.recipe.training
    sizes = batch_schedule(loaded.recipe.accumulation, batch.global_batch_rows, training.num_train_epochs)
    total_rows: int | None = None
    if training.max_steps is not None:
        planned = training.max_steps
    else:
        epochs = training.num_train_epochs
        assert epochs is not None, "the recipe has max_steps or num_train_epochs"
        planned = planned_windows(rows, sizes, epochs)
        total_rows = sum(epoch_rows(rows, epochs))
    return Schedule(
        shape=training.lr_scheduler_type,
        peak=training.learning_rate,
        warmup_steps=warmup_steps_of(training.warmup_ratio, training.warmup_steps, planned),
        planned_steps=planned,
        max_steps=training.max_steps,
        total_rows=total_rows,
        batch=sizes,
        scaling=lr_scaling(training),
        warmup_share=(
            training.warmup_ratio if (sizes.varies or sizes.adapts) and training.warmup_steps is None else None
        ),
    )


def assemble(plan: JobSpec, say: Callable[[str], None], measure: bool = False) -> Job:
    """Check the engine's scale, start it, load the model, build the optimizer, prepare. A collective. Raises UserError.

    With `measure` the engine's meter keeps what memory is taken for from the start.
    """
    most_steps = plan.batch.steps(plan.schedule.batch.largest_rows)
    timeout = ranks_wait(plan.loaded.recipe.training.step_timeout_seconds)
    settings = EngineSettings(plan.strategy, most_steps, plan.batch.per_device_rows, plan.max_grad_norm, timeout)
    # before an engine under which models are sharded
    weights = weights_beforehand(plan.loaded, plan.facts) if plan.strategy.engine == "deepspeed" else None
    probe = start_probe_engine(settings, say)
    _refuse_unequal(plan, probe)
    scale_check = check_scale(probe)
    engine = start_engine(settings, say)
    if weights is not None:
        engine.size_buffers(weights)
    engine.meter.enabled = measure
    with engine.meter.assembling():
        network = load_model(plan.loaded, plan.strategy, plan.facts, engine.device)
        engine.meter.module = network
        engine.meter.point("load")
        trained, parameters = parameter_counts(network)
        optimizer = make_optimizer(network, plan.loaded.recipe.training, plan.strategy)
        name = optimizer_name(optimizer)
        engine.prepare(SummedLoss(network, objective_for(network, plan.facts)), optimizer)
        engine.meter.point("prepare")
    described = {
        "parameters": parameters,
        "trained_parameters": trained,
        "frozen_type": frozen_type(network),
        "optimizer": name,
    }
    return Job(plan, engine, described, scale_check)


def _refuse_unequal(plan: JobSpec, engine: Engine) -> None:
    """Raises UserError where ranks chose different micro-batches, because their devices differ. A collective."""
    rows = engine.gather_objects(plan.batch.per_device_rows) if plan.chosen else [0]
    if min(rows) < max(rows):
        key = "training.device_memory"
        raise UserError(
            f"{plan.loaded.location(key)}: {key} is auto, and the ranks' devices differ: they would take {rows} rows"
            f" per micro-batch. Set {key} to what the smallest one has."
        )
