"""From a trained run to an answer: the exported folder reproduces the run's last evaluation loss in a new process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import forked, launch
from tests.support.forked import run
from tests.support.launch import ROOT, launch_file, program
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

LORA = ("lora.r=8", "lora.alpha=32", "training.learning_rate=2e-2")
RUNS = {
    "full": (dict(ranks=1), ()),
    "LoRA, ZeRO-3 offload": (dict(ranks=2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu"), LORA),
    "QLoRA": (dict(ranks=1), (*LORA, "model.load_in_4bit=true")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Output folders of one run of each kind, on the same data."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_recipe(folder / "job")
    cache = {"FINETUNE_CACHE": str(folder / "cache")}
    outputs = {}
    for number, (name, (layout, overrides)) in enumerate(RUNS.items()):
        outputs[name] = folder / f"run{number}"
        config = launch_file(folder / f"{number}.yaml", **layout)
        way = launch if name == "full" else forked  # what imports say is not said again in a fork
        result = way.train(config, recipe, f"output_dir={outputs[name]}", *overrides, env=cache, timeout=600)
        assert result.returncode == 0, result.stderr[-4000:]
        if way is launch:
            assert "4bit" not in result.stderr, "noise of a library that this run does not use"
    return outputs


@pytest.fixture(scope="module")
def reloaded(runs) -> dict[str, float]:
    """Evaluation losses by plain transformers and peft, in one new process."""
    cache = {"FINETUNE_CACHE": str(runs["full"].parent / "cache")}
    result = run([sys.executable, *program("reload"), *runs.values()], env=cache)
    assert result.returncode == 0, result.stderr[-4000:]
    losses = json.loads(result.stdout.splitlines()[-1])
    return {name: losses[str(folder)] for name, folder in runs.items()}


def evaluations(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def finetune(*arguments: str | Path):
    return run([sys.executable, "-m", "finetune", *arguments], cwd=ROOT)


@pytest.mark.parametrize("name", RUNS)
def test_a_new_process_reproduces_the_final_evaluation_loss(runs, reloaded, name):
    recorded = evaluations(runs[name])
    assert recorded[-1] < recorded[0] - 0.05, "it learned"
    assert abs(reloaded[name] - recorded[-1]) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_is_whole(runs, name):
    model = runs[name] / "model"
    assert not model.with_name("model.tmp").exists()
    assert (model / "tokenizer.json").exists() and (model / "chat_template.jinja").exists()
    if name == "full":
        assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [
            354,
            357,
        ]  # </s> <|im_end|>
    else:
        adapter = json.loads((model / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(runs[name].parent / "job" / "base")
        tensors = load_file(model / "adapter_model.safetensors")
        assert len(tensors) == 2 * 7 * 2  # A and B of seven layers in two blocks
        assert all(name.startswith("base_model.model.model.layers.") and t.any() for name, t in tensors.items())


@pytest.mark.parametrize("name", RUNS)
def test_generate_prints_answers_and_nothing_else(runs, name):
    result = finetune("generate", runs[name] / "model", "the quick brown", "--max-new-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout.strip() or name != "full"  # barely tuned adapters may end the turn at once
    assert "<|" not in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("name", RUNS)
def test_the_last_checkpoint_exports_to_the_same_weights(runs, name, tmp_path):
    from typer.testing import CliRunner

    from finetune.commands.cli import app

    done = CliRunner().invoke(app, ["checkpoints", str(runs[name]), "--export", "newest", str(tmp_path / "model")])
    assert done.exit_code == 0, done.stderr
    for file in [*(runs[name] / "model").glob("*.safetensors"), *(runs[name] / "model").glob("finetune_base.json")]:
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_generate_samples_by_seed_and_names_several_prompts(runs):
    def sample(seed: int) -> str:
        result = finetune(
            "generate",
            runs["full"] / "model",
            "a fox",
            "a dog",
            "--max-new-tokens",
            "8",
            "--temperature",
            "1",
            "--seed",
            str(seed),
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = sample(1)
    assert [line for line in first.splitlines() if line.startswith("> ")] == ["> a fox", "> a dog"]
    assert sample(1) == first != sample(2)


def test_generate_refuses_what_is_no_model(runs, tmp_path):
    for argument, words in ((tmp_path / "missing", "no such model folder"), (runs["full"], "Did you mean")):
        result = finetune("generate", argument, "hello")
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.strip().splitlines()) == 1
        assert str(argument) in result.stderr and words in result.stderr


def test_export_merges_what_was_trained(runs, tmp_path):
    """QLoRA: the merged model has the loss that the 4-bit base had with its adapter."""
    output = tmp_path / "merged"
    result = finetune("export", runs["QLoRA"] / "model", output / "model")
    assert result.returncode == 0, result.stderr
    assert "Logits" in result.stdout and len(result.stdout.splitlines()) == 1
    assert "quantization_config" not in json.loads((output / "model" / "config.json").read_text())
    (output / "recipe.yaml").write_text((runs["QLoRA"] / "recipe.yaml").read_text())
    cache = {"FINETUNE_CACHE": str(runs["full"].parent / "cache")}
    again = run([sys.executable, *program("reload"), output], env=cache)
    assert again.returncode == 0, again.stderr[-4000:]
    loss = json.loads(again.stdout.splitlines()[-1])[str(output)]
    assert abs(loss - evaluations(runs["QLoRA"])[-1]) < 1e-5

    for folder, target, words in (
        (runs["QLoRA"] / "model", output / "model", "exists already"),
        (output / "model", tmp_path / "other", "full model already"),
    ):
        refused = finetune("export", folder, target)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert words in refused.stderr
