"""The recipe's keys: names, types, ranges, defaults and what each is for. Every key here does something."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune.recipe.field_types import (
    AUTO_OR_SIZE,
    LayerName,
    NonEmpty,
    PositiveInt,
    Section,
    Stage,
    canonical_optimizer,
)
from finetune.recipe.sizes import PATTERN

# Of each pair at most one may be set; the second displaces the first one's default.
EXCLUSIVE = (
    (("training", "num_train_epochs"), ("training", "max_steps")),
    (("training", "warmup_ratio"), ("training", "warmup_steps")),
    (("data", "eval"), ("data", "eval_fraction")),
)
LEARNING_RATE_FULL, LEARNING_RATE_LORA = 2.0e-5, 2.0e-4
Attention = Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"]
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
Warmup = Annotated[list[Stage], Field(min_length=1)] | Annotated[list[PositiveInt], Field(min_length=1)]


class ModelSection(Section):
    """Which model is tuned."""

    name_or_path: NonEmpty
    """Hub id or local folder of the model to start from (required)."""
    revision: NonEmpty = "main"
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for models whose author you trust."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of frozen weights and of the exported folder; auto is the checkpoint's own. Trained weights are float32."""
    attn_implementation: Attention = "auto"
    """Attention kernel; auto is the fastest that transformers finds without extra packages (sdpa if a model has it)."""
    load_in_4bit: bool = False
    """QLoRA: keep the frozen base in 4 bits (bitsandbytes NF4, double quantisation). Needs a lora section."""


class LoraSection(Section):
    """Low-rank adapters; leave the whole section out for full fine-tuning."""

    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveInt = 32
    """Scale: an adapter's output is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters; 0 keeps runs with different launch files identical."""
    target_modules: Literal["all-linear"] | Annotated[list[LayerName], Field(min_length=1)] = "all-linear"
    """Which layers get adapters: all-linear (all but the output head), or a list of layer names."""


class SourceSection(Section):
    """One source of rows."""

    path: NonEmpty
    """Local file (.parquet; .jsonl, .json, .csv, .tsv, .txt, also as .gz), folder of files, or hub id (required)."""
    split: NonEmpty = "train"
    """Split of a hub data set, or of a folder whose file names begin with the word train, test or validation."""
    subset: NonEmpty | None = None
    """Configuration of a hub data set that has several."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text"] = "auto"
    """Format of a row; auto recognises it by the columns. Of preference pairs the chosen answer is learned."""
    columns: dict[NonEmpty, NonEmpty] = {}
    """Names of your columns: {our name: your name}, for example {prompt: question, completion: answer}."""
    system: NonEmpty | None = None
    """System prompt for conversations that have none."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often each row is taken per epoch: 2 takes it twice, 0.5 takes half of the rows, chosen by the seed."""


class DataSection(Section):
    """The data to learn from, and how a row becomes tokens."""

    train: Annotated[list[SourceSection], Field(min_length=1)]
    """Sources of the training rows, in order (required)."""
    eval: Annotated[list[SourceSection], Field(min_length=1)] | None = None
    """Sources of the evaluation rows."""
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    """Instead of eval: this share of the training rows is held out, chosen by the seed."""
    max_length: int = Field(2048, ge=2)
    """Tokens per row at most; longer rows are truncated."""
    packing: bool = True
    """Put rows into micro-batches one after the other, without padding. A micro-batch then holds at most
    training.per_device_train_batch_size x max_length tokens, and each row attends to itself alone. The update is the
    same as with false. A model that cannot keep rows apart is trained padded, and one line says so.
    """
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Tokens that are trained: all assistant turns with their end-of-turn token, only the last turn, or every token.
    In plain text every token is trained.
    """
    max_rows: PositiveInt | None = None
    """Use at most this many training rows, counted over the sources in order, before weights and eval_fraction."""
    streaming: bool = False
    """Tokenise rows during training instead of before it, for data that do not fit on a disk.
    Needs training.max_steps. The weights of the sources are then their shares of the rows.
    """
    max_dropped_fraction: float = Field(0.1, ge=0, le=1)
    """It is an error if more than this share of rows is dropped (no trained token, or refused by the template)."""


class TrainingSection(Section):
    """The mathematics of the run: these settings decide the resulting weights."""

    num_train_epochs: float | None = Field(1, gt=0)
    """Passes over the training rows. Instead of max_steps."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps. Instead of num_train_epochs."""
    global_batch_size: PositiveInt = 64
    """Rows per optimizer step, over all ranks and micro-batches."""
    per_device_train_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Rows per micro-batch: what one rank takes in one forward. With data.packing, a micro-batch takes rows of at most
    this times data.max_length tokens.
    """
    gradient_accumulation_steps: PositiveInt | Literal["auto"] = "auto"
    """Micro-batches per rank and optimizer step (K). auto, the only value with data.packing, follows from the two sizes
    above and the number of ranks.
    """
    learning_rate: float = Field(LEARNING_RATE_FULL, ge=0)
    """Peak learning rate. Default: 2e-4 with a lora section, 2e-5 without."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "cosine"
    """How the learning rate changes after the warm-up."""
    warmup_ratio: float | None = Field(0.03, ge=0, le=1)
    """Share of the planned steps over which the learning rate rises from 0. Instead of warmup_steps."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises from 0. Instead of warmup_ratio."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Multiplies the learning rate by global batch / reference_batch_size (linear), or by its square root (sqrt)."""
    reference_batch_size: PositiveInt | None = None
    """The global batch, in rows, that learning_rate was chosen for. Required with lr_scaling."""
    optim: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"], BeforeValidator(canonical_optimizer)
    ] = "adamw"
    """Optimizer; Hugging Face's names are aliases. The run chooses the implementation and prints it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to AdamW's denominator."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the gradient of the whole window to this norm; 0 does not clip."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward: less memory and about a third more time, with the same mathematics."""
    device_memory: Annotated[str, AUTO_OR_SIZE, Field(json_schema_extra={"pattern": f"^(auto|{PATTERN})$"})] = "auto"
    """Device memory that micro-batches chosen by `auto` must fit into; auto is the device's memory less a margin."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time.
    This is slower on a GPU, and an operation without such a kernel ends the run.
    """
    stop_on_loss_spike: bool = True
    """End the run with status 4 when the losses of three steps in a row are far above the losses before.
    The rule is in finetune/training/loss_spike.py.
    """
    step_timeout_seconds: float = Field(1800.0, ge=0)
    """End the run and name the rank when a rank makes no progress for this time; 0 waits for ever.
    Progress is a micro-batch, an evaluation batch or a save.
    """
    seed: int = Field(42, ge=0, le=2**32 - 1)
    """Random seed of row order, dropout, adapter initialisation and the held-out rows."""

    @model_validator(mode="before")
    @classmethod
    def _displaced_defaults(cls, given: Any) -> Any:
        if isinstance(given, dict):
            given = dict(given)
            for first, second in EXCLUSIVE:
                if first[0] == "training" and given.get(second[1]) is not None:
                    given.setdefault(first[1], None)
        return given


class AccumulationSection(Section):
    """How many rows a step takes over the run. K, the micro-batches per step, always follows from the rows."""

    schedule: Literal["constant", "warmup", "adaptive"] = "constant"
    """constant: the global batch from the first step on. warmup: small batches first, as `warmup` says.
    adaptive: the global batch first; the batch then doubles or halves whenever it is far from the measured gradient
    noise scale.
    """
    warmup: Warmup = [[0.25, 0.1], [0.5, 0.2], [1.0, 1.0]]
    """Pairs: until this share of the run, steps take this share of the global batch (rounded to rows, at least one).
    Or one K per epoch, such as [2, 4, 6, 8] for min(2 * epoch, 8). The greatest K stands for the global batch, the
    others for their share of it. The last K holds to the end of the run.
    """
    smallest: Annotated[float, Field(gt=0, le=1)] = 0.25
    """adaptive: the least share of the global batch. Sizes are the global batch times powers of two."""
    largest: Annotated[float, Field(ge=1)] = 4.0
    """adaptive: the greatest multiple of the global batch."""
    measure_every: PositiveInt = 5
    """adaptive: windows between two measurements of the gradient noise.
    Each measurement reads the gradients of all micro-batches of one window.
    """

    @property
    def by_epoch(self) -> bool:
        """Whether `warmup` says one K per epoch."""
        return isinstance(self.warmup[0], int)

    @property
    def steps_by_epoch(self) -> list[int]:
        """`warmup` as one K per epoch; empty where it holds pairs."""
        return [steps for steps in self.warmup if isinstance(steps, int)]

    @property
    def shares(self) -> list[tuple[float, float]]:
        """`warmup` as pairs (until this share of the run, this share of the global batch); empty where it holds K."""
        return [(pair[0], pair[1]) for pair in self.warmup if isinstance(pair, list)]


class EvaluationSection(Section):
    """When the held-out loss is measured. It is also measured before the first step and at the end."""

    eval_steps: PositiveInt = 100
    """Optimizer steps between two evaluations."""


class CheckpointSection(Section):
    """What is kept so that the run can be resumed."""

    save_steps: PositiveInt = 200
    """Optimizer steps between two checkpoints."""
    save_total_limit: PositiveInt = 2
    """How many checkpoints are kept; an older one is deleted after a newer one is complete."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss.
    Choose evaluation.eval_steps and save_steps so that evaluations and checkpoints fall on the same steps.
    """
    resume: Literal["auto", "never"] = "auto"
    """auto: the same command resumes from the newest undamaged checkpoint.
    never: start over; previous contents of output_dir move to output_dir/before-N.
    """
    allow_changed: list[NonEmpty] = []
    """Dotted keys, such as training.learning_rate, that may differ from the checkpoint's recipe at a resume."""


class LoggingSection(Section):
    """What is written down during the run."""

    logging_steps: PositiveInt = 1
    """Optimizer steps between two lines of metrics.jsonl."""
    report_to: list[Tracker] = []
    """Experiment trackers that get the same numbers. Install them yourself; if one fails, the run prints a warning."""


class Recipe(Section):
    """What to learn, from what, and how."""

    # local paths are absolute once finetune.recipe.load.load has made it; `include` is always None then
    include: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    """Recipe files to start from, relative to this file's folder. They are merged in order; this file's keys win."""
    model: ModelSection
    """Which model is tuned (required)."""
    lora: LoraSection | None = None
    """Low-rank adapters; leave out for full fine-tuning."""
    data: DataSection
    """The data to learn from (required)."""
    training: TrainingSection = TrainingSection()
    """The mathematics of the run."""
    accumulation: AccumulationSection = AccumulationSection()
    """How many rows a step takes over the run."""
    evaluation: EvaluationSection = EvaluationSection()
    """When the held-out loss is measured."""
    checkpoint: CheckpointSection = CheckpointSection()
    """What is kept so that the run can be resumed."""
    logging: LoggingSection = LoggingSection()
    """What is written down during the run."""
    output_dir: NonEmpty
    """Folder of the run, relative to the working directory (required)."""

    @model_validator(mode="before")
    @classmethod
    def _learning_rate_by_method(cls, given: Any) -> Any:
        training = given.get("training", {}) if isinstance(given, dict) else None
        if isinstance(training, dict):
            rate = LEARNING_RATE_FULL if given.get("lora") is None else LEARNING_RATE_LORA
            given = {**given, "training": {"learning_rate": rate, **training}}
        return given
