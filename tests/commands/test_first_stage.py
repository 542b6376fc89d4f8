"""Every command refuses what it can refuse before torch and the other slow libraries are loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import __version__
from finetune.commands.cli import app
from tests.support.launch import ROOT, environment

SLOW = {"torch", "transformers", "datasets", "accelerate", "deepspeed", "peft", "bitsandbytes"}
# What the first stage refuses, and a part of its message. {folder} holds recipe.yaml, which packs and gives K.
REFUSED = {
    "train": ("{folder}/recipe.yaml", "gradient_accumulation_steps"),
    "check": ("{folder}/recipe.yaml", "gradient_accumulation_steps"),
    "plan": ("{folder}/recipe.yaml", "gradient_accumulation_steps"),
    "verify": ("{folder}/recipe.yaml", "gradient_accumulation_steps"),
    "data": ("{folder}/recipe.yaml data.max_lengths=3", "data.max_lengths"),
    "generate": ("{folder}/model Hello", "no such model folder"),
    "export": ("{folder}/adapter {folder}/out --dtype int8", "--dtype is int8"),
    "checkpoints": ("{folder}/run", "no such folder"),
    "checkpoints --export newest {folder}/out": ("{folder}/run", "no such folder"),
    "verify --launch {folder}/none.yaml": ("{folder}/recipe.yaml", "none.yaml"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("first_stage")
    (path / "rows.jsonl").write_text('{"text": "a"}\n')
    (path / "recipe.yaml").write_text(
        "model: {name_or_path: no/model}\ndata: {train: [{path: rows.jsonl}], max_length: 64}\noutput_dir: out\n"
        "training: {global_batch_size: 7, gradient_accumulation_steps: 2, learning_rate: 1.0e-4, max_steps: 1}\n"
    )
    return path


def started(*arguments: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """(the ended command, the libraries that it had imported)"""
    command = [sys.executable, "-X", "importtime", "-m", "finetune", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    imported = re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "finetune.commands.cli" in imported
    return done, {name.split(".")[0] for name in imported}


@pytest.mark.parametrize("command", REFUSED)
def test_a_refusal_of_the_first_stage_comes_before_torch(command, folder):
    arguments, words = REFUSED[command]
    done, imported = started(*f"{command} {arguments}".format(folder=folder).split())
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and words in said[-1], said
    assert not imported & SLOW


def test_every_command_is_in_the_table():
    assert {command.callback.__name__ for command in app.registered_commands} == {key.split()[0] for key in REFUSED}


def test_the_version_is_printed():
    done, imported = started("--version")
    assert (done.returncode, done.stdout) == (0, f"finetune {__version__}\n")
    assert not imported & SLOW
