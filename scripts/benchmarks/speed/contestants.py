"""One contestant of scripts/benchmark.py in a process of its own: steps when it is told to.

    python -m scripts.benchmarks.speed.contestants NAME JOB.json

Every line on stdin lets it do one optimizer step, after which it prints {"wall", "cpu", "cpu_from_start"}, seconds of
the step and CPU seconds of all its threads. At the end of stdin it prints its held-out loss and peak memory. All
train the same windows of the same token rows with AdamW on the mean over the window's trained tokens, clipped at 1."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.batching.windows import row_order
from finetune.data.token_cache import IGNORED, TokenRow
from finetune.engine.libraries import prepare_libraries
from scripts.benchmarks.speed.job import MAX_LENGTH, SpeedJob

Steps = Iterator[None]


def prepared(job: SpeedJob, *overrides: str) -> Any:
    """The recipe of the job as this project plans it."""
    from finetune.launch.strategy import one_process
    from finetune.recipe.load import load_recipe
    from finetune.training.job import prepare

    settings = [
        f"training.global_batch_size={job.window_rows}",
        f"training.per_device_train_batch_size={job.micro_batch_rows}",
        f"training.learning_rate={job.learning_rate}",
        f"training.adam_epsilon={job.adam_epsilon}",
        f"training.gradient_checkpointing={str(job.gradient_checkpointing).lower()}",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.max_steps=100000",
        f"training.seed={job.seed}",
    ]
    loaded = load_recipe(f"{job.folder}/recipe.yaml", [*settings, *overrides])
    return prepare(loaded, one_process(job.precision, use_cpu=True), lambda line: None)


def windows(plan: Any) -> Iterator[list[TokenRow]]:
    """The rows of one optimizer step after the other, in this project's order."""
    rows, seed, size = plan.data.train, plan.loaded.recipe.training.seed, plan.batch.global_batch_rows
    epoch = 0
    while True:
        order = row_order(len(rows), seed, epoch).tolist()
        for first in range(0, len(order), size):
            yield [rows.row(i) for i in order[first : first + size]]
        epoch += 1


def ours(job: SpeedJob, *overrides: str) -> tuple[Steps, Callable[[], nn.Module]]:
    from finetune.training.job import assemble
    from finetune.training.step import train

    running = assemble(prepared(job, *overrides), lambda line: None)
    steps = (None for _ in train(running))
    return steps, lambda: running.engine.inner_model()


def network(job: SpeedJob) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{job.folder}/base", dtype=torch.float32).train()
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def autocast(job: SpeedJob) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16")


def by_hand(job: SpeedJob, packed: bool) -> tuple[Steps, Callable[[], nn.Module]]:
    """A loop as one writes it: padded and masked, or the fastest that was found."""
    plan, model = prepared(job), network(job)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.learning_rate, eps=job.adam_epsilon, weight_decay=0.0, fused=packed
    )
    losses = _packed_losses if packed else _padded_losses

    def steps() -> Steps:
        for rows in windows(plan):
            tokens = sum(int((row.labels != IGNORED).sum()) for row in rows)
            for loss in losses(job, model, rows):
                (loss / tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    return steps(), lambda: model


def _padded_losses(job: SpeedJob, model: nn.Module, rows: Sequence[TokenRow]) -> Iterator[Tensor]:
    for first in range(0, len(rows), job.micro_batch_rows):
        batch = pad([vars(row) for row in rows[first : first + job.micro_batch_rows]])
        with autocast(job):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        yield F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")


def pad(rows: Sequence[dict]) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask (rows, tokens), padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        parts = [np.pad(row[name], (0, width - len(row[name])), constant_values=value) for row in rows]
        return torch.from_numpy(np.stack(parts).astype(np.int64))

    mask = torch.from_numpy(np.stack([np.arange(width) < len(row["input_ids"]) for row in rows])).long()
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", IGNORED), "attention_mask": mask}


def _segments(module, query, key, value, attention_mask, scaling=None, lengths=None, **kwargs):
    parts = zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scaling, enable_gqa=True) for p in parts]
    return torch.cat([output.transpose(1, 2) for output in outputs], 1), None


def _packed_losses(job: SpeedJob, model: nn.Module, rows: Sequence[TokenRow]) -> Iterator[Tensor]:
    """Longest first into the first micro-batch with room; causal attention per segment; logits where trained."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("by_hand", _segments)
    AttentionMaskInterface.register("by_hand", lambda *args, **kwargs: None)
    model.set_attn_implementation("by_hand")
    bins: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        limit = job.micro_batch_rows * MAX_LENGTH - len(row.input_ids)
        place = next((b for b in bins if sum(len(r.input_ids) for r in b) <= limit), None)
        (place.append(row) if place is not None else bins.append([row]))
    for part in bins:
        lengths = [len(row.input_ids) for row in part]
        ids = torch.from_numpy(np.concatenate([row.input_ids for row in part]).astype(np.int64))
        labels = torch.from_numpy(np.concatenate([row.labels for row in part]).astype(np.int64))
        predicting = (labels[1:] != IGNORED).nonzero().flatten()
        positions = torch.cat([torch.arange(length) for length in lengths])
        with autocast(job):
            logits = model(
                input_ids=ids[None],
                position_ids=positions[None],
                logits_to_keep=predicting,
                use_cache=False,
                lengths=lengths,
            ).logits
        yield F.cross_entropy(logits[0].float(), labels[predicting + 1], reduction="sum")


class _Sequential:
    """Mixed into a Trainer: rows in the order they are given."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def hf_trainer(job: SpeedJob, wait: Callable[[], bool], done: Callable[[], None]) -> nn.Module:
    """Hugging Face's Trainer, which steps by itself: `wait` before a step, `done` after it."""
    import transformers

    class Ordered(_Sequential, transformers.Trainer):
        pass

    trainer = Ordered(
        model=network(job),
        args=_arguments(job, transformers.TrainingArguments),
        train_dataset=_pre_tokenised(job),
        data_collator=pad,
        callbacks=[_paced(wait, done)],
    )
    trainer.train()
    return trainer.model


def trl(job: SpeedJob, wait: Callable[[], bool], done: Callable[[], None], packing: bool) -> nn.Module:
    """TRL's SFTTrainer, when it is installed."""
    import trl as library

    class Ordered(_Sequential, library.SFTTrainer):
        pass

    extra = dict(packing=packing, max_length=MAX_LENGTH, dataset_kwargs={"skip_prepare_dataset": not packing})
    trainer = Ordered(
        model=network(job),
        args=_arguments(job, library.SFTConfig, **extra),
        train_dataset=_pre_tokenised(job),
        callbacks=[_paced(wait, done)],
    )
    trainer.train()
    return trainer.model


def _pre_tokenised(job: SpeedJob) -> Any:
    import datasets

    rows = (row for _, window in zip(range(64), windows(prepared(job)), strict=False) for row in window)
    return datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def _arguments(job: SpeedJob, kind: Any, **extra: Any) -> Any:
    return kind(
        output_dir=f"{job.folder}/trainer",
        per_device_train_batch_size=job.micro_batch_rows,
        gradient_accumulation_steps=job.window_rows // job.micro_batch_rows,
        learning_rate=job.learning_rate,
        adam_epsilon=job.adam_epsilon,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_steps=100_000,
        bf16=job.precision == "bf16",
        gradient_checkpointing=job.gradient_checkpointing,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
        **extra,
    )


def _paced(wait: Callable[[], bool], done: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class Paced(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not wait():
                control.should_training_stop = True

        def on_step_end(self, args, state, control, **kwargs):
            done()

    return Paced()


def held_out_loss(job: SpeedJob, model: nn.Module) -> float:
    """Mean loss per trained token over the held-out rows, row by row, in float32: the same for every contestant."""
    rows = prepared(job).data.evaluation
    if getattr(model.config, "_attn_implementation", "") != "sdpa":
        model.set_attn_implementation("sdpa")
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in map(rows.row, range(len(rows))):
            ids, labels = (torch.from_numpy(part.astype(np.int64))[None] for part in (row.input_ids, row.labels))
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"))
            count += int((labels[0, 1:] != IGNORED).sum())
    return total / count


OURS = {"ours": (), "ours, packing off": ("data.packing=false",)}
BY_HAND = {"padded by hand": False, "packed by hand": True}
TRAINERS = {
    "HF Trainer": hf_trainer,
    "TRL": lambda job, wait, done: trl(job, wait, done, packing=False),
    "TRL, packed": lambda job, wait, done: trl(job, wait, done, packing=True),
}
NAMES = (*OURS, *BY_HAND, *TRAINERS)


def main(name: str, file: str) -> None:
    job = SpeedJob(**json.loads(Path(file).read_text(encoding="utf-8")))
    os.environ["FINETUNE_CPU_THREADS"] = str(job.threads)
    prepare_libraries(use_cpu=True)
    import transformers.trainer  # noqa: F401 - what every contestant has in memory before it reads a weight

    import finetune.training.job  # noqa: F401

    base = psutil.Process().memory_info().rss
    answer = sys.stdout
    sys.stdout = sys.stderr
    begun = [0.0, 0.0]

    def say(found: dict) -> None:
        print(json.dumps(found), file=answer, flush=True)

    def wait() -> bool:
        asked = sys.stdin.readline()
        begun[:] = time.perf_counter(), time.process_time()
        return bool(asked.strip())

    def done() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        say({"wall": wall - begun[0], "cpu": cpu - begun[1], "cpu_from_start": cpu})

    if name in TRAINERS:
        model = TRAINERS[name](job, wait, done)
    else:
        steps, inner = ours(job, *OURS[name]) if name in OURS else by_hand(job, BY_HAND[name])
        while wait():
            next(steps)
            done()
        model = inner()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say({"base_bytes": base, "peak_bytes": peak, "held_out_loss": held_out_loss(job, model)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
