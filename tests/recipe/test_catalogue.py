"""Every shipped recipe: it loads, names launch files that exist, and trains a tiny model of its family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.commands.train import train_in_place
from finetune.launch import compatibility
from finetune.launch.config_file import read_launch_file
from finetune.launch.preflight import resolve
from finetune.recipe.load import load_recipe
from finetune.recipe.strict_yaml import parse
from tests.support.data import write_jsonl
from tests.support.tiny_models import chat_rows, tiny_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
LAUNCH_FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
FAMILY = {
    "qwen3": "qwen3",
    "llama3.1": "llama",
    "gemma3": "gemma3",
    "mistral": "mistral",
    "gpt3": "gpt2",
    "quickstart": "qwen3",
}
NAMES = [f"{path.parent.name}/{path.name}" for path in RECIPES]


def test_the_catalogue_holds_what_was_promised():
    settings = [load_recipe(path, here(path)).recipe for path in RECIPES]
    hub_ids = {parse(path.read_text()).value["model"]["name_or_path"] for path in RECIPES}
    assert len(RECIPES) >= 11
    assert {
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "google/gemma-3-1b-it",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "meta-llama/Llama-3.1-70B-Instruct",
    } <= hub_ids
    assert any(recipe.model.load_in_4bit for recipe in settings)
    assert sum(recipe.lora is None for recipe in settings) >= 4
    assert sum(recipe.data.loss_on == "all" for recipe in settings) >= 2
    assert all(recipe.lora is None or recipe.lora.dropout == 0 for recipe in settings)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_each_recipe_names_its_schema_and_a_launch_file(path):
    first, *rest = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=../../finetune/recipe.schema.json"
    assert (path.parent / first.partition("$schema=")[2]).resolve() == ROOT / "finetune" / "recipe.schema.json"
    comment = "\n".join(line for line in rest if line.startswith("#"))
    if path.parent.name != "quickstart":
        assert f"recipes/{path.parent.name}/{path.name}" in comment
        assert any(f"accelerate_configs/{file.name}" in comment for file in LAUNCH_FILES)
    assert (path.parent.name in ("gpt3-175b", "quickstart")) or f"runs/{path.parent.name}-" in path.read_text()


def here(path: Path, folder: Path | None = None) -> list[str]:
    """Overrides that make a shipped recipe load without its model."""
    return [f"model.name_or_path={folder or ROOT}"]


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_goes_with_every_launch_file_or_the_table_says_why_not(path, file):
    overrides = here(path)
    if path.parent.name == "quickstart":
        overrides += ["training.global_batch_size=64"]  # its small batch does not divide over sixteen GPUs
    loaded, strategy = load_recipe(path, overrides), read_launch_file(file)
    refused = compatibility.refusals(loaded, strategy)
    expected = []
    if loaded.recipe.model.load_in_4bit and strategy.zero_stage == 3:
        expected.append("model.load_in_4bit is true")
    if "8bit" in loaded.recipe.training.optim and strategy.offload_optimizer != "none":
        expected.append(f"training.optim is {loaded.recipe.training.optim}")
    assert len(refused) == len(expected)
    for message, words in zip(refused, expected, strict=True):
        assert message.startswith(f"{path}:") and words in message and str(file) in message
    if not refused:
        batch = resolve(loaded, strategy).batch
        assert batch.per_device_rows * batch.accumulation_steps * batch.ranks == batch.global_batch_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function from family name to a tiny model's folder, with chat.jsonl and text.jsonl beside it."""
    folder = tmp_path_factory.mktemp("families")
    write_jsonl(folder / "chat.jsonl", chat_rows(24))
    texts = [{"text": " ".join(m["content"] for m in row["messages"])} for row in chat_rows(24, seed=1)]
    write_jsonl(folder / "text.jsonl", texts)

    def make(family: str) -> Path:
        if not (folder / family).exists():
            tiny_model(folder / family, family)
        return folder / family

    return make


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_two_steps_with_a_tiny_model_of_the_same_family(path, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    family = next(FAMILY[name] for name in FAMILY if path.parent.name.startswith(name))
    model = tiny(family)
    loss_on = load_recipe(path, here(path)).recipe.data.loss_on
    data = model.parent / ("text.jsonl" if loss_on == "all" else "chat.jsonl")
    overrides = [
        f"model.name_or_path={model}",
        f"data.train=[{{path: {data}}}]",
        "data.eval_fraction=0.2",
        "data.max_length=64",
        "training.max_steps=2",
        "training.global_batch_size=4",
        "training.per_device_train_batch_size=2",
        f"output_dir={tmp_path / 'run'}",
    ]
    train_in_place(str(path), overrides)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert sum("eval_loss" in row for row in rows) == 2
    adapter = load_recipe(path, here(path)).recipe.lora is not None
    assert (tmp_path / "run" / "model" / ("adapter_model.safetensors" if adapter else "model.safetensors")).is_file()
