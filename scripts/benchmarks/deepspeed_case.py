"""One DeepSpeed version under one launch file; started by scripts/benchmarks/deepspeed_versions.py through `accelerate
launch`.

Arguments: recipe.yaml out.json. Rank 0 writes what `finetune verify` says, what the start-up check says, and what four
AdamW steps come to without that check: once as this project's engine accumulates, once with accelerate's own
`accumulate()`. A crash is a result too: it is written down, and the next part starts afresh."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from finetune.batching.layout import split_into_micro_batches
from finetune.data.collate import padded
from finetune.data.token_cache import TokenRow
from finetune.engine.engine import Engine
from finetune.engine.libraries import prepare_libraries
from finetune.engine.optimizer import make_optimizer
from finetune.engine.scale_check import check_scale, start_probe_engine
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.errors import Diverged, UserError
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.model.distance import relative
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.objectives.sft import SummedLoss
from finetune.process.exit_status import REPORT_FILE
from finetune.recipe.load import load_recipe
from finetune.training import verification
from finetune.training.one_batch_reference import Reference, accumulate

K, PER_DEVICE_ROWS = 4, 2
WINDOW_ROWS, WINDOWS = PER_DEVICE_ROWS * K * 2, 4  # on two ranks
ADAMW = ("training.learning_rate=1e-3", "training.adam_epsilon=1e-6", "training.weight_decay=0.01")
OURS = Engine.micro_step


def with_accumulate(self, batch, denominator, last):
    """A micro-batch as accelerate's documentation has it: its `accumulate()` counts to K, and may enter DeepSpeed's
    no_sync.
    """
    with self.accelerator.accumulate(self.module):
        assert self.accelerator.sync_gradients == last
        summed_loss = self.module(batch)
        self.accelerator.backward(summed_loss * (self.ranks * K / denominator))
    if last:
        self._end_window()
    return summed_loss.detach()


def ragged_rows(count: int, vocabulary: int) -> list[TokenRow]:
    """Rows of 3 to 48 tokens, a random part of each trained."""
    random = np.random.default_rng(5)
    rows = []
    for _ in range(count):
        length = int(random.integers(3, 49))
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(random.random(length) < random.random(), ids, -100).astype(np.int32)
        labels[0], labels[-1] = -100, ids[-1]
        rows.append(TokenRow(ids, labels))
    return rows


def accumulated(recipe_path: str, strategy, micro_step) -> dict:
    """Four AdamW steps without a start-up check: weights against four big batches, gradient norms over the true
    ones.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    loaded = load_recipe(recipe_path, ADAMW)
    facts = read_facts(loaded)
    rows = ragged_rows(WINDOW_ROWS * WINDOWS, facts.vocabulary)
    parts = [rows[i * WINDOW_ROWS : (i + 1) * WINDOW_ROWS] for i in range(WINDOWS)]
    engine = start_engine(EngineSettings(strategy, K, PER_DEVICE_ROWS, 1.0))
    network = load_model(loaded, strategy, facts, engine.device)
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
    states, norms = [engine.full_state_dict(only_trained=True)], []
    Engine.micro_step = micro_step
    try:
        for part in parts:
            share = split_into_micro_batches(range(WINDOW_ROWS), engine.ranks, PER_DEVICE_ROWS)[engine.rank]
            accumulate(engine, [padded([part[i] for i in micro_batch], 0) for micro_batch in share])
            norms.append(engine.grad_norm())
            states.append(engine.full_state_dict(only_trained=True))
    finally:
        Engine.micro_step = OURS
    rank = engine.rank
    engine.release()
    if rank != 0:
        return {}
    unset_hf_deepspeed_config()  # or zero.Init would shard the reference
    reference = Reference(loaded, facts)
    for part in parts:
        reference.step(part)
    difference, ratios = relative(states[-1], reference.state()), []
    for norm, state, part in zip(norms, states, parts, strict=True):
        reference.load(state)
        ratios.append(norm / reference.step(part)[1])
    return {"weight_difference": difference, "norm_ratios": ratios}


def checked(strategy) -> dict:
    """What the start-up check says."""
    probe = start_probe_engine(EngineSettings(strategy, K, PER_DEVICE_ROWS, 1.0))
    try:
        return {"caught": False, "said": check_scale(probe)}
    except UserError as error:
        return {"caught": True, "said": str(error)}


def verified(recipe_path: str, folder: Path) -> dict:
    """What `finetune verify` says in this launch, with K = 4 too."""
    report, status, said = folder / "verify.json", 0, ""
    os.environ[REPORT_FILE] = str(report)
    rows = (f"training.per_device_train_batch_size={PER_DEVICE_ROWS}", f"training.global_batch_size={WINDOW_ROWS}")
    try:
        verification.verify(recipe_path, rows, False, True)
    except (Diverged, UserError) as error:
        status, said = error.exit_code, str(error)
    cases = json.loads(report.read_text())["cases"] if report.exists() else []
    return {"caught": status != 0, "exit_status": status, "said": said, "cases": cases}


def attempt(part: Callable[[], dict]) -> dict:
    """The part's result, or how it crashed."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations import unset_hf_deepspeed_config

    try:
        return part()
    except Exception as error:  # noqa: BLE001 - old versions fail in many ways, and that is what is measured
        traceback.print_exc()
        return {"caught": True, "crash": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        AcceleratorState._reset_state()  # also after a crash the next part gets an engine of its own
        GradientState._reset_state()
        unset_hf_deepspeed_config()


def main() -> None:
    recipe_path, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = from_environment(os.environ, launched_by()[1])
    import deepspeed

    found = {"deepspeed": deepspeed.__version__, "file": deepspeed.__file__}
    parts = {
        "verify": lambda: verified(recipe_path, out.parent),  # first, as in real life: before there is a process group
        "selfcheck": lambda: checked(strategy),
        "ours": lambda: accumulated(recipe_path, strategy, OURS),
        "accumulate": lambda: accumulated(recipe_path, strategy, with_accumulate),
    }
    for name, part in parts.items():
        found[name] = attempt(part)
        if int(os.environ.get("RANK", "0")) == 0:
            out.write_text(json.dumps(found))


main()
