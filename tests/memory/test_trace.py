"""Traced bytes against real ones: zero bytes off, for whole models and for models whose layers are continued."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from finetune.engine.storages import StorageTracker, pretending
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.trace import Precision, profile, trace
from finetune.model.facts import read_facts
from finetune.recipe.load import load_recipe
from tests.support.forked import run
from tests.support.launch import ROOT, program
from tests.support.tiny_models import FAMILIES, small_recipe


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> list[dict]:
    done = run(
        [sys.executable, *program("traced"), tmp_path_factory.mktemp("traced")],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_window_takes_the_bytes_of_a_real_one(traced, family):
    cases = [case for case in traced if case["case"].startswith(family + ",")]
    assert len(cases) == 10
    wrong = [
        f"{case['case']}: traced {case['traced']}, real {case['real']}"
        for case in cases
        if case["traced"] != case["real"]
    ]
    assert not wrong, "\n".join(wrong)


DEEP = {
    "llama": 6,
    "qwen3": 5,
    "mistral": 6,
    "gemma3": 14,
    "gpt2": 6,
}  # gemma3 repeats after six layers, and 14 leaves two over


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_layers_that_repeat_are_continued_exactly(tmp_path, family, checkpointing):
    path = small_recipe(tmp_path, rows=4, family=family)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    layers = DEEP[family]
    config["n_layer" if family == "gpt2" else "num_hidden_layers"] = layers
    if "layer_types" in config:
        kinds = ["sliding_attention"] * 5 + ["full_attention"] if family == "gemma3" else config["layer_types"][:1]
        config["layer_types"] = (kinds * layers)[:layers]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    loaded = load_recipe(path, [f"training.gradient_checkpointing={checkpointing}"])
    facts = read_facts(loaded)
    shape, numbers = MicroBatchShape(2, 48), Precision("bf16")
    continued = profile(loaded, facts, shape, 2, numbers)
    whole = trace(loaded, facts, shape, 2, numbers, None)
    assert continued.peak_bytes == max(sum(kinds.values()) for alive in whole.values() for kinds in alive)


def test_a_storage_counts_once_and_until_its_last_view_is_gone():
    tracker = StorageTracker()
    with tracker:
        whole = torch.zeros(100)
        part = whole[:10]
        assert tracker.live_bytes == 400
        del whole
        assert tracker.live_bytes == 400
        part = part + 1
        assert tracker.live_bytes == 40 and tracker.peak_bytes == 440
        del part
    assert tracker.live_bytes == 0


def test_pretended_tensors_take_no_memory_and_real_numbers_of_bytes():
    with pretending(), (tracker := StorageTracker()):
        large = torch.zeros(2**40) @ torch.zeros(2**40, 2**10)
        assert tracker.peak_bytes == 4 * (2**40 + 2**50 + 2**10)
        assert large.norm().item() == 1.0  # a number that no size depends on


def test_adapters_on_one_layer_of_many_are_traced_whole_and_a_continued_trace_has_whole_bytes(tmp_path, monkeypatch):
    from finetune.launch.strategy import one_process
    from finetune.memory.estimate import estimate
    from finetune.memory.micro_batch_shape import MicroBatchShape
    from finetune.model.facts import read_facts
    from finetune.model.outline import outlined
    from finetune.recipe.load import load_recipe
    from tests.support import tiny_models

    monkeypatch.setitem(tiny_models.FAMILIES, "llama", ("Llama", tiny_models.SMALL | {"num_hidden_layers": 8}))
    written = tiny_models.small_recipe(tmp_path)
    last, plain = (
        load_recipe(written, overrides) for overrides in (["lora.target_modules=[layers.7.mlp.down_proj]"], [])
    )
    found = [outlined(loaded, read_facts(loaded)) for loaded in (last, plain)]
    assert [(one.layers, one.period) for one in found] == [(8, 8), (8, 1)]
    for loaded in (last, plain):
        for rows in (4, 8, 6):  # the third is continued from the others
            shape = MicroBatchShape(rows, 16)
            found = estimate(loaded, read_facts(loaded), one_process("bf16"), shape, 2, on_cpu=False)
        assert found.traced and all(isinstance(size, (int, float)) for size in found.items.values())
