"""Every way to start a run: uninstalled from anywhere, torchrun, `finetune train --launch` and its exit status,
starting twice.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from finetune.launch.start import free_port
from tests.support.launch import CONFIGS, ROOT, TRAIN, accelerate, run
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("launch"))


@pytest.fixture
def env(tmp_path) -> dict[str, str]:
    return {"FINETUNE_CACHE": str(tmp_path / "cache")}


def document(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_an_uninstalled_copy_runs_from_a_foreign_folder(recipe, env, tmp_path):
    copy = tmp_path / "somewhere" / "finetune"
    shutil.copytree(ROOT / "finetune", copy, ignore=shutil.ignore_patterns("__pycache__"))
    marker = tmp_path / "imported.txt"
    with (copy / "__init__.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'a').write(__file__ + '\\n')\n")
    (tmp_path / "elsewhere").mkdir()
    env |= {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    done = accelerate(
        CONFIGS / "cpu.yaml",
        copy / "train.py",
        recipe,
        "output_dir=out",
        "training.max_steps=2",
        cwd=tmp_path / "elsewhere",
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(marker.read_text().split()) == {str(copy / "__init__.py")}, "the copy ran, not an installed package"
    output = tmp_path / "elsewhere" / "out"  # output_dir is relative to where one starts
    assert document(output)["status"] == "done"
    assert (output / "model" / "model.safetensors").exists()


def test_torchrun_starts_two_ranks(recipe, env, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "finetune/train.py",
        recipe,
        f"output_dir={output}",
    ]
    done = run(command, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = document(output)
    assert (found["status"], found["exit_code"]) == ("done", 0)
    assert found["plan"]["strategy"]["engine"] == "ddp"
    assert found["plan"]["batch"] == {
        "global_batch_rows": 8,
        "per_device_rows": 2,
        "accumulation_steps": 2,
        "ranks": 2,
        "open": False,
        "row_tokens": 64,
    }
    steps = [row for row in metrics(output) if "loss" in row]
    assert [row["rows"] for row in steps] == [8] * 5, "40 rows after 10 were held out"
    assert done.stderr.count("held-out loss at step 0") == 1, "rank 0 speaks for all"


def finetune_train(recipe: Path, *arguments: str, cwd: Path, env: dict):
    """`python -m finetune train` as an installed command would run: from any folder."""
    return run(
        [sys.executable, "-m", "finetune", "train", recipe, *arguments], cwd=cwd, env=env | {"PYTHONPATH": str(ROOT)}
    )


def test_train_launches_returns_0_and_a_second_start_has_nothing_to_do(recipe, env, tmp_path):
    arguments = (
        "--launch",
        str(CONFIGS / "cpu_2_ranks.yaml"),
        f"output_dir={tmp_path / 'out'}",
        "training.max_steps=2",
    )
    done = finetune_train(recipe, *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    first = document(tmp_path / "out")
    assert (first["status"], first["plan"]["strategy"]["ranks"]) == ("done", 2)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()

    again = finetune_train(recipe, *arguments, cwd=tmp_path, env=env)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"{tmp_path / 'out'} holds a finished run: nothing to do" in again.stderr
    assert "loading libraries" not in again.stderr
    assert document(tmp_path / "out") == first
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_train_returns_the_trainers_status_and_ends_with_its_message(recipe, env, tmp_path):
    arguments = ("--launch", str(CONFIGS / "cpu.yaml"), f"output_dir={tmp_path / 'out'}")
    diverged = finetune_train(recipe, *arguments, "training.learning_rate=1e30", cwd=tmp_path, env=env)
    assert diverged.returncode == 4, diverged.stderr[-3000:]
    last = diverged.stderr.rstrip().splitlines()[-1]
    assert last.startswith("training diverged at step ") and "Lower training.learning_rate" in last
    found = document(tmp_path / "out")
    assert (found["status"], found["exit_code"], found["message"]) == ("failed", 4, last)
    assert not (tmp_path / "out" / "model").exists()

    refused = finetune_train(recipe, *arguments, "training.learning_rate=1e-3", cwd=tmp_path, env=env)
    assert refused.returncode == 2
    last = refused.stderr.rstrip().splitlines()[-1]
    assert (
        f"output_dir {tmp_path / 'out'} holds another run, without a checkpoint: training.learning_rate: 1e+30 -> 0.001"
        in last
    )
    assert document(tmp_path / "out") == found, "what is there stays"


def test_one_plain_process_without_a_launch_file(recipe, env, tmp_path):
    assert "LOCAL_RANK" not in os.environ
    done = finetune_train(recipe, f"output_dir={tmp_path / 'out'}", "training.max_steps=1", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert document(tmp_path / "out")["plan"]["strategy"]["source"] == "one process"
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [0, 1, 1]
    assert rows[0]["eval_loss"] > rows[-1]["eval_loss"]
    assert Path(document(tmp_path / "out")["argv"][0]) == TRAIN
