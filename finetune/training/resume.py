"""Where a run begins: from nothing, or from the newest checkpoint that verifies and belongs to the same run."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.checkpoint import checkpoint, snapshots
from finetune.checkpoint.identity import base_fingerprint, comparable, differences, tokenizer_fingerprint, versions
from finetune.checkpoint.progress import Progress
from finetune.checkpoint.snapshots import Snapshot
from finetune.engine.deepspeed.checkpoint import not_convertible
from finetune.errors import UserError
from finetune.recipe.load import LoadedRecipe, read_resolved
from finetune.report import redact
from finetune.report.console import Console
from finetune.report.run_folder import BEFORE, CHECKPOINTS
from finetune.training.job import Job


def facts_of(job: Job) -> dict:
    """What goes into a checkpoint's manifest: `same` must be met again at a resume, the rest is for people."""
    plan = job.plan
    sharded = plan.strategy.engine == "deepspeed"
    return {
        "same": {
            "recipe": redact.tree(comparable(plan.loaded.recipe.model_dump(mode="json", exclude_none=True))),
            "rows of the training data": plan.data.train.fingerprint,
            "base model": base_fingerprint(plan.loaded.recipe.model.name_or_path, plan.loaded.recipe.model.revision),
            "tokenizer": tokenizer_fingerprint(plan.tokenizer),
            "rows per optimizer step": plan.batch.global_batch_rows,
            "mixed precision": plan.strategy.mixed_precision,
            "engine": "DeepSpeed" if sharded else "plain",
            "ZeRO stage": plan.strategy.zero_stage,
            "optimizer offload": plan.strategy.offload_optimizer if sharded else "any",
        },
        "ranks": plan.strategy.ranks,
        "gradient_accumulation_steps": plan.batch.accumulation_steps,
        "versions": versions(),
    }


def begin(job: Job, console: Console, output_dir: Path, facts: dict) -> Progress:
    """The progress to go on from, with the engine in its state; Progress() for a new run. A collective.

    Raises UserError where the newest checkpoint belongs to another recipe or other data, or to shards that cannot be
    converted."""
    loaded = job.plan.loaded
    if loaded.recipe.checkpoint.resume == "never":
        if job.engine.rank == 0:
            _move_away(output_dir, console)
        job.engine.barrier()
        return Progress()
    root = output_dir / CHECKPOINTS
    found = checkpoint.choose(job.engine, root, console.say)
    if found is None:
        job.engine.on_rank_0(lambda: _refuse_what_is_there(loaded, output_dir))
        return Progress()
    # a fact of checkpoints from before shards could be converted
    allowed = [*loaded.recipe.checkpoint.allow_changed, "ranks of the shards"]
    different = differences(found.facts["same"], facts["same"], allowed)
    if different:
        raise UserError(
            f"{loaded.location('output_dir')}: output_dir {output_dir} holds step {found.step} of another run:"
            f" {'; '.join(different)}. Undo the change, name the key in checkpoint.allow_changed, give another"
            " output_dir, or start over with checkpoint.resume=never."
        )
    if facts["same"]["engine"] == "DeepSpeed" and found.facts["ranks"] != job.engine.ranks:
        _refuse_other_ranks(job, found)
        console.say(
            f"converting the shards of step {found.step}: {found.facts['ranks']} -> {job.engine.ranks} ranks ..."
        )
    progress = checkpoint.load(job.engine, found)
    if job.engine.rank == 0:
        snapshots.retire(root, found.step)
    job.engine.barrier()
    ranks = (
        ""
        if found.facts["ranks"] == job.engine.ranks
        else (
            f" ({found.facts['ranks']} ranks then, {job.engine.ranks} now: the same rows and learning rates, added up"
            " in another order)"
        )
    )
    console.say(f"resuming after step {found.step}, {progress.total_tokens:,} tokens, from {found.folder}{ranks}")
    return progress


def _refuse_other_ranks(job: Job, found: Snapshot) -> None:
    """Raises UserError where DeepSpeed's shards cannot be converted for this number of ranks."""
    loaded, then = job.plan.loaded, found.facts["ranks"]
    optims = (found.facts["same"]["recipe"]["training.optim"], loaded.recipe.training.optim)
    if reason := next(filter(None, (not_convertible(job.plan.strategy, optim) for optim in optims)), ""):
        raise UserError(
            f"{loaded.location('output_dir')}: output_dir {loaded.recipe.output_dir} holds step {found.step}, written"
            f" by DeepSpeed on {then} ranks, and this run has {job.engine.ranks}: {reason}. Go on with {then} ranks,"
            " give another output_dir, or start over with checkpoint.resume=never."
        )


def _refuse_what_is_there(loaded: LoadedRecipe, output_dir: Path) -> None:
    """A folder without a checkpoint is started again, unless there was one, or what was started was something else."""
    if damaged := snapshots.listing(output_dir / CHECKPOINTS):
        raise UserError(
            f"{loaded.location('output_dir')}: no checkpoint of {output_dir} can be used, see above (steps"
            f" {', '.join(str(snapshot.step) for snapshot in damaged)}). Repair the disk, give another output_dir, or"
            " start over with checkpoint.resume=never, which moves what is there away."
        )
    there = read_resolved(output_dir / "recipe.yaml")
    if there is None:
        return
    now = redact.tree(comparable(loaded.recipe.model_dump(mode="json", exclude_none=True)))  # as it was written
    different = differences(comparable(there), now, loaded.recipe.checkpoint.allow_changed)
    if different:
        raise UserError(
            f"{loaded.location('output_dir')}: output_dir {output_dir} holds another run, without a checkpoint:"
            f" {'; '.join(different)}. Give another output_dir, or move what is there away with"
            " checkpoint.resume=never."
        )


def _move_away(output_dir: Path, console: Console) -> None:
    """Everything in the folder goes to output_dir/before-N; nothing is deleted."""
    here = [p for p in output_dir.iterdir() if not p.name.startswith((BEFORE, "."))] if output_dir.exists() else []
    if not here:
        return
    numbers = [p.name.removeprefix(BEFORE) for p in output_dir.glob(f"{BEFORE}*")]
    number = 1 + max((int(text) for text in numbers if text.isdigit()), default=0)
    target = output_dir / f"{BEFORE}{number}"
    target.mkdir()
    for path in here:
        os.rename(path, target / path.name)
    console.say(f"checkpoint.resume is never: starting over; previous contents moved to {target}")
