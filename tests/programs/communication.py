"""Collectives of one window, counted by torch's profiler on the process group itself. For launched tests."""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import numpy as np
import torch

from finetune.data.collate import padded
from finetune.engine.optimizer import make_optimizer
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.parameters import parameter_elements
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import load_recipe
from tests.programs.random_rows import random_rows
from tests.support.exact_table import PER_DEVICE_ROWS

COUNTED_K = (1, 3, 8)
CONFIGURED = 4


def count_collectives(recipe_path: str, strategy) -> list[dict]:
    """Per K: calls and elements of each collective of one rank in a window of K full micro-batches, in full
    fine-tuning.

    Ours are left out: the window's token count before it and its loss after it, one sum of a few scalars each. The
    third window of each K is measured, when DDP's buckets and ZeRO-3's prefetch order have settled."""
    loaded = load_recipe(recipe_path, ("training.optim=sgd", "training.learning_rate=0.1"))
    engine = start_engine(EngineSettings(strategy, CONFIGURED, PER_DEVICE_ROWS, 1.0))
    facts = read_facts(loaded)
    network = load_model(loaded, strategy, facts, engine.device)
    parameters = sum(map(parameter_elements, network.parameters()))
    engine.prepare(SummedLoss(network), make_optimizer(network, loaded.recipe.training, strategy))
    random, found = np.random.default_rng(7), []
    for k in COUNTED_K:
        for measured in (False, False, True):
            batches = [padded(random_rows(random, PER_DEVICE_ROWS, facts.vocabulary), 0) for _ in range(k)]
            (tokens,) = engine.all_reduce_sum(sum(batch.trained_tokens for batch in batches))
            with _profile() if measured else contextlib.nullcontext() as profile:
                for i, batch in enumerate(batches):
                    engine.micro_step(batch, tokens, last=i == k - 1)
            if measured:
                found.append({"K": k, "parameters": parameters, "collectives": collectives(profile)})
    engine.release()
    return found


def _profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)


def collectives(profile) -> dict[str, dict[str, int]]:
    """Calls and elements by collective; those of at most 8 elements (norms, overflow flags) go under "scalars"."""
    calls, elements = Counter(), Counter()
    for event in profile.events():
        if not event.name.startswith("gloo:"):
            continue
        size = sum(math.prod(shape) for shape in event.input_shapes if shape)
        name = event.name.removeprefix("gloo:") if size > 8 else "scalars"
        calls[name] += 1
        elements[name] += size
    return {name: {"calls": calls[name], "elements": elements[name]} for name in sorted(calls)}
