"""Recipes: what is accepted, what it becomes, and where every value came from."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune.errors import UserError
from finetune.recipe.field_types import OPTIM_ALIASES
from finetune.recipe.load import load_recipe

MINIMAL = """\
model: {name_or_path: org/model}
data:
  train:
    - path: rows.jsonl
output_dir: runs/x
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe beside rows.jsonl, in a folder that is not the working directory; returns a loader."""
    folder, elsewhere = tmp_path / "recipes", tmp_path / "cwd"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(elsewhere)

    def write(text=MINIMAL, *overrides):
        (folder / "recipe.yaml").write_text(text)
        return load_recipe("../recipes/recipe.yaml", overrides)

    return write


def test_defaults(recipe):
    loaded = recipe()
    training = loaded.recipe.training
    assert loaded.recipe.lora is None
    assert (training.num_train_epochs, training.max_steps) == (1, None)
    assert (training.warmup_ratio, training.warmup_steps) == (0.03, None)
    assert training.per_device_train_batch_size == training.gradient_accumulation_steps == "auto"
    assert loaded.recipe.data.packing is True
    assert loaded.recipe.data.train[0].split == "train"
    assert not loaded.is_set("training.seed")
    assert not loaded.is_set("training")


def test_the_default_learning_rate_is_higher_for_adapters(recipe):
    assert recipe().recipe.training.learning_rate == 2e-5
    assert recipe(MINIMAL + "lora: {}\n").recipe.training.learning_rate == 2e-4
    assert recipe(MINIMAL + "lora: {}\n", "training.learning_rate=1e-3").recipe.training.learning_rate == 1e-3


def test_max_steps_displaces_the_default_epochs_and_warmup_steps_the_default_ratio(recipe):
    training = recipe(MINIMAL + "training: {max_steps: 5, warmup_steps: 0}\n").recipe.training
    assert (training.num_train_epochs, training.max_steps) == (None, 5)
    assert (training.warmup_ratio, training.warmup_steps) == (None, 0)


def test_an_override_displaces_the_other_key_in_the_file(recipe):
    text = MINIMAL + "training: {num_train_epochs: 3, warmup_steps: 7}\n"
    loaded = recipe(text, "training.max_steps=5", "training.warmup_ratio=0.1")
    assert (loaded.recipe.training.num_train_epochs, loaded.recipe.training.max_steps) == (None, 5)
    assert (loaded.recipe.training.warmup_steps, loaded.recipe.training.warmup_ratio) == (None, 0.1)
    assert not loaded.is_set("training.num_train_epochs")


def test_overrides_are_yaml_values(recipe):
    loaded = recipe(
        MINIMAL,
        "training.learning_rate=1e-5",
        "lora.r=32",
        "lora.target_modules=[q_proj, v_proj]",
        "training.gradient_checkpointing=false",
        "data.train[0].split=test",
    )
    assert loaded.recipe.training.learning_rate == 1e-5
    assert loaded.recipe.lora.r == 32
    assert loaded.recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert loaded.recipe.training.gradient_checkpointing is False
    assert loaded.recipe.data.train[0].split == "test"
    assert loaded.is_set("lora.r") and not loaded.is_set("lora.alpha")


def test_where_names_line_or_command_line(recipe):
    text = MINIMAL + "training:\n  seed: 1\n"
    loaded = recipe(text, "training.max_steps=5", "data.eval=[{path: ../recipes/rows.jsonl}]")
    name = "../recipes/recipe.yaml"
    assert loaded.location("training.seed") == f"{name}:7"
    assert loaded.location("data.train[0].path") == loaded.location("data.train.0.path") == f"{name}:4"
    assert loaded.location("training.max_steps") == loaded.location("data.eval[0].path") == "command line"
    assert loaded.location("training.optim") == f"{name}:6"  # not said: the section it belongs in
    assert loaded.location("logging.logging_steps") == name


def test_relative_paths_in_the_file_start_at_its_folder_and_overrides_at_the_working_directory(recipe, tmp_path):
    (tmp_path / "cwd" / "rows.jsonl").write_text("{}\n")
    assert recipe().recipe.data.train[0].path == str(tmp_path / "recipes" / "rows.jsonl")
    overridden = recipe(MINIMAL, "data.train=[{path: rows.jsonl}]")
    assert overridden.recipe.data.train[0].path == str(tmp_path / "cwd" / "rows.jsonl")


def test_each_falls_back_to_the_other_folder(recipe, tmp_path):
    assert recipe(MINIMAL, "data.train=[{path: rows.jsonl}]").recipe.data.train[0].path.endswith("recipes/rows.jsonl")
    (tmp_path / "cwd" / "org" / "model").mkdir(parents=True)
    assert recipe().recipe.model.name_or_path == str(tmp_path / "cwd" / "org" / "model")


def test_what_is_not_there_is_a_hub_id_unless_it_looks_local(recipe):
    assert recipe().recipe.model.name_or_path == "org/model"
    for missing in ("./model", "~/no-such-model", "/no/such/model", "a/b/c", "a b"):
        with pytest.raises(UserError, match=r"recipe.yaml:1: model.name_or_path is .* but there is no /"):
            recipe(MINIMAL.replace("org/model", missing))
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train\[0\].path is 'gone.jsonl'"):
        recipe(MINIMAL.replace("rows.jsonl", "gone.jsonl"))


def test_output_dir_is_relative_to_the_working_directory(recipe, tmp_path):
    assert recipe().recipe.output_dir == str(tmp_path / "cwd" / "runs" / "x")


def test_the_dump_is_a_recipe_that_loads_as_the_same(recipe, tmp_path, monkeypatch):
    text = MINIMAL.replace("model}", "model, revision: '1e10'}") + "lora: {target_modules: [a, 'no']}\n"
    loaded = recipe(text, "training.max_steps=3", "training.learning_rate=1e-5", "data.eval_fraction=0.1")
    assert "null" not in loaded.dump()
    (tmp_path / "resolved.yaml").write_text(loaded.dump())
    monkeypatch.chdir("/")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again.recipe == loaded.recipe
    assert again.dump() == loaded.dump()


@pytest.mark.parametrize(("theirs", "ours"), OPTIM_ALIASES.items())
def test_hugging_face_optimizer_names_are_ours(recipe, theirs, ours):
    assert recipe(MINIMAL, f"training.optim={theirs}").recipe.training.optim == ours


def test_a_recipe_cannot_be_changed(recipe):
    with pytest.raises(ValidationError):
        recipe().recipe.training.seed = 3


def test_reading_a_recipe_and_a_launch_file_imports_no_torch():
    code = (
        "import sys, finetune.recipe.load, finetune.launch.strategy; print([m for m in ('torch', 'transformers',"
        " 'datasets',"
    )
    code += " 'accelerate', 'numpy') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
