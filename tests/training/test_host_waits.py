"""How often a window makes the host wait for the device: counted on the CPU, where the same operations run."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.engine.engine import Engine
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.training.job import assemble, prepare
from finetune.training.step import train
from tests.support.tiny_models import small_recipe

# what a GPU must have finished before the host knows its result: a number, or a shape that depends on values
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


class Waits(TorchDispatchMode):
    """Counts such operations, and masks of bool as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_three_waits_per_window_and_none_per_micro_batch(tmp_path, monkeypatch, packing, family):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe(tmp_path / "job", family=family)
    found, sums, real = {}, [], Engine.all_reduce_sum
    monkeypatch.setattr(Engine, "all_reduce_sum", lambda self, *values: sums.append(1) or real(self, *values))
    for rows in (1, 4):
        loaded = load_recipe(recipe, [f"data.packing={packing}", f"training.per_device_train_batch_size={rows}"])
        job = assemble(prepare(loaded, one_process(use_cpu=True), lambda line: None), lambda line: None)
        windows = train(job)
        next(windows)
        sums.clear()
        with Waits() as waits:
            result = next(windows)
        # the window's tokens, its loss with the requests, and the gradient's norm
        assert len(sums) == 2 and waits.seen == ["_local_scalar_dense"]
        found[rows] = result.gradient_accumulation_steps
        job.engine.release()
    assert found[1] > found[4]
