"""`finetune checkpoints`: what it lists, what it finds damaged, and that an exported checkpoint is the run's own
model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.commands.cli import app
from tests.support.kill_points import flip
from tests.support.launch import ROOT, environment
from tests.support.saved_runs import KINDS

pytestmark = pytest.mark.slow

TOP = ["run", "checked", "latest", "resume_from", "checkpoints"]
ENTRY = [
    "step",
    "name",
    "window",
    "epoch",
    "rows",
    "total_tokens",
    "train_loss",
    "eval_loss",
    "bytes",
    "saved_time",
    "age_seconds",
    "engine",
    "zero_stage",
    "mixed_precision",
    "ranks",
    "problems",
]


def command(*arguments: object):
    """The command line in this process; stdout and stderr apart."""
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])


@pytest.fixture
def run(saved_runs, tmp_path) -> Path:
    """A copy of the plain run, to be spoilt."""
    return Path(shutil.copytree(saved_runs["plain"], tmp_path / "run"))


def test_the_document_is_frozen_and_right(saved_runs):
    run = saved_runs["ZeRO-2"]
    done = command(run, "--json")
    document = json.loads(done.stdout)
    assert (
        done.exit_code == 0 and list(document) == TOP and all(list(entry) == ENTRY for entry in document["checkpoints"])
    )
    assert (document["checked"], document["latest"], document["resume_from"]) == ("lengths", "step-4", 4)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in document["checkpoints"]:
        (row,) = [row for row in logged if row["step"] == entry["step"] and "loss" in row]
        (held_out,) = [row["eval_loss"] for row in logged if row["step"] == entry["step"] and "eval_loss" in row]
        assert (entry["window"], entry["total_tokens"], entry["train_loss"]) == (
            row["window"],
            row["total_tokens"],
            row["loss"],
        )
        assert (entry["rows"], entry["eval_loss"]) == (
            8 * entry["step"],
            held_out,
        ), "the last one was evaluated after it was saved"
        assert (entry["engine"], entry["zero_stage"], entry["ranks"], entry["mixed_precision"]) == (
            "DeepSpeed",
            2,
            2,
            "no",
        )
        files = [path for path in (run / "checkpoints" / entry["name"]).rglob("*") if path.is_file()]
        assert entry["bytes"] == sum(path.stat().st_size for path in files if path.name != "manifest.json")
        assert 0 <= entry["age_seconds"] < 3600 and entry["problems"] == []
    assert [entry["step"] for entry in document["checkpoints"]] == [2, 4]


def test_the_keys_are_documented():
    page = (ROOT / "docs/resume.md").read_text().partition("## Inspecting checkpoints")[2].partition("\n## ")[0]
    assert [key for key in TOP + ENTRY if f"`{key}`" not in page] == []


def test_the_table_says_what_a_resume_takes_and_what_was_read(run):
    lengths, hashes = command(run), command(run, "--verify")
    assert lengths.exit_code == hashes.exit_code == 0
    assert "a resume takes step 4 (manifests and lengths are right; --verify reads every byte)" in lengths.stdout
    assert "a resume takes step 4 (every byte was read and is as it was saved)" in hashes.stdout
    assert "written by one process, no mixed precision" in lengths.stdout
    (last,) = [line for line in lengths.stdout.splitlines() if line.split()[0] == "4"]
    assert last.rstrip().endswith("latest, resume, best"), "the losses fall"


@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_a_flipped_bit_is_found_by_verify_alone_and_length_by_both(flag, run):
    flip(run / "checkpoints/step-4/model.safetensors", 5000)
    assert command(run, *flag).exit_code == 0
    done = command(run, *flag, "--verify")
    assert done.exit_code == 2
    assert done.stderr.strip() == f"{run}/checkpoints/step-4 is damaged: model.safetensors: its sha256 differs"
    if flag:
        assert json.loads(done.stdout)["resume_from"] == 2
    os.truncate(run / "checkpoints/step-2/optimizer.json", 1)
    done = command(run, *flag)
    assert done.exit_code == 2 and "step-2 is damaged: optimizer.json has 1 bytes instead of" in done.stderr


def test_a_flipped_bit_in_the_small_state_is_always_found(run):
    flip(run / "checkpoints/step-4/state.json", 20)
    done = command(run)
    assert done.exit_code == 2 and "step-4 is damaged: state.json: its sha256 differs" in done.stderr


def test_what_is_no_run_is_refused_and_a_run_without_checkpoints_is_not(run, tmp_path):
    for wrong, words in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "is no run's output folder"),
        (run / "checkpoints/step-4", f"Did you mean {run}?"),
    ):
        done = command(wrong)
        assert done.exit_code == 2 and words in done.stderr and done.stdout == ""
        done = command(wrong, "--json")
        document = json.loads(done.stdout)
        assert done.exit_code == 2 and not document["ok"] and words in document["problems"][0]
    shutil.rmtree(run / "checkpoints")
    done = command(run)
    assert done.exit_code == 0 and "no checkpoint yet" in done.stdout
    assert json.loads(command(run, "--json").stdout)["checkpoints"] == []


def test_the_list_needs_no_torch(saved_runs):
    code = (
        "import sys; from finetune.commands.checkpoints import checkpoints; checkpoints(sys.argv[1], True);"
        " print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, saved_runs["plain"]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_exported_is_the_runs_model_bit_for_bit(kind, saved_runs, tmp_path):
    from transformers import AutoModelForCausalLM

    run, output = saved_runs[kind], tmp_path / "model"
    done = command(run, "--export", "newest", output)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"{output}: step 4 of {run} as ") and len(done.stdout.splitlines()) == 1
    names = sorted(path.name for path in (run / "model").iterdir())
    assert names == sorted(path.name for path in output.iterdir())
    for name in set(names) - {"adapter_config.json"}:  # peft writes its layers in the order of a set
        assert (output / name).read_bytes() == (run / "model" / name).read_bytes(), name
    if "LoRA" in kind:
        ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (output, run / "model"))
        assert {k: sorted(v) if isinstance(v, list) else v for k, v in ours.items()} == {
            k: sorted(v) if isinstance(v, list) else v for k, v in theirs.items()
        }
    assert AutoModelForCausalLM.from_pretrained(output) is not None


def test_an_earlier_step_is_exported_too_and_is_another_model(saved_runs, tmp_path):
    outputs = {step: tmp_path / step for step in ("2", "4")}
    for step, output in outputs.items():
        assert command(saved_runs["plain"], "--export", step, output).exit_code == 0
    two, four = ((output / "model.safetensors").read_bytes() for output in outputs.values())
    assert len(two) == len(four) and two != four


def test_an_export_refuses_damage_other_models_and_what_is_there(run, tmp_path):
    output = tmp_path / "out"
    recipe = run / "recipe.yaml"
    good = recipe.read_text()
    for change, words in (
        (good.replace("output_dir:", "lora: {r: 4, alpha: 8}\noutput_dir:"), "was written with another model: lora."),
        (good.replace("trust_remote_code: false", "load_in_5bit: true"), f"{recipe}: "),
        ("", f"{recipe}: is not there or not readable"),
    ):
        recipe.write_text(change)
        done = command(run, "--export", "4", output)
        assert done.exit_code == 2 and words in done.stderr and not output.exists(), done.stderr
    recipe.write_text(good)
    done = command(run, "--export", "3", output)
    assert (
        done.exit_code == 2
        and f"no checkpoint of step 3 in {run}/checkpoints. Give one of 2, 4, or newest" in done.stderr
    )
    flip(run / "checkpoints/step-4/model.safetensors", 5000)
    done = command(run, "--export", "newest", output)
    assert (
        done.exit_code == 2
        and "step-4 is damaged and not exported: model.safetensors: its sha256 differs" in done.stderr
    )
    assert not output.exists(), "the newest was asked for, not an older one"
    output.mkdir()
    done = command(run, "--export", "2", output)
    assert done.exit_code == 2 and f"{output}: exists already" in done.stderr and not list(output.iterdir())
