"""What can be wrong at a resume: damaged checkpoints, another recipe, a full disk, a second run. Real files, real
processes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.forked import run
from tests.support.launch import TRAIN, environment, program
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

KILLED = program("killed_run")
COMMON = {"training.max_steps": "8", "checkpoint.save_steps": "2", "evaluation.eval_steps": "100"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = train(recipe, output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def killed(recipe, tmp_path_factory) -> Path:
    """The same run, killed after step 7: checkpoints of steps 4 and 6."""
    output = tmp_path_factory.mktemp("killed") / "run"
    done = run(command((*KILLED, "7"), recipe, output))
    assert done.returncode == -9, done.stderr[-3000:]
    return output


def command(program: Sequence[str | Path], recipe: Path, output: Path, *overrides: str) -> list[str]:
    values = COMMON | dict(override.split("=", 1) for override in overrides) | {"output_dir": str(output)}
    return [sys.executable, *map(str, program), str(recipe), *(f"{key}={value}" for key, value in values.items())]


def train(recipe: Path, output: Path, *overrides: str):
    return run(command((TRAIN,), recipe, output, *overrides))


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(recipe, killed, whole, tmp_path):
    output = Path(shutil.copytree(killed, tmp_path / "run"))
    victim = output / "checkpoints/step-6/optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = train(recipe, output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step-6 is damaged and not used: optimizer.safetensors" in done.stderr
    assert "resuming after step 4" in done.stderr
    assert losses(output) == losses(whole)


def test_killed_while_writing_the_model_only_that_is_done_again(recipe, whole, tmp_path):
    output = tmp_path / "run"
    killed = run(command(program("killed_export"), recipe, output))
    assert killed.returncode == -9 and not (output / "model").exists()
    done = train(recipe, output)
    assert done.returncode == 0 and "resuming after step 8" in done.stderr, done.stderr[-3000:]
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (output, whole)
    ]
    kept = [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in each] for each in rows]
    assert kept[0] == kept[1]
    assert (output / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_without_any_good_checkpoint_nothing_is_touched(recipe, killed, tmp_path):
    output = Path(shutil.copytree(killed, tmp_path / "run"))
    for folder in (output / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    before = (output / "metrics.jsonl").read_bytes()
    done = train(recipe, output)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("is damaged and not used") == 2
    assert "can be used, see above (steps 4, 6)" in done.stderr.splitlines()[-1]
    assert (output / "metrics.jsonl").read_bytes() == before


def test_another_recipe_is_refused_with_what_changed_unless_it_is_allowed(recipe, killed, tmp_path):
    output = Path(shutil.copytree(killed, tmp_path / "run"))
    before = (output / "metrics.jsonl").read_bytes()
    done = train(recipe, output, "training.learning_rate=5e-3", "training.seed=7")
    assert done.returncode == 2
    last = done.stderr.rstrip().splitlines()[-1]
    assert "holds step 6 of another run: " in last
    assert "training.learning_rate: 0.01 -> 0.005; training.seed: 42 -> 7" in last
    assert "Traceback" not in done.stderr
    assert (output / "metrics.jsonl").read_bytes() == before, "nothing was touched"
    done = train(recipe, output, "training.learning_rate=5e-3", "checkpoint.allow_changed=[training.learning_rate]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(output)) == 8


def test_another_micro_batch_goes_on_with_the_same_rows(recipe, killed, whole, tmp_path):
    output = Path(shutil.copytree(killed, tmp_path / "run"))
    done = train(recipe, output, "training.per_device_train_batch_size=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output)[:6] == losses(whole)[:6]
    assert losses(output)[6:] == pytest.approx(losses(whole)[6:], abs=1e-5)  # nats: sums in another order


def test_never_starts_over_and_keeps_what_was_there(recipe, killed, whole, tmp_path):
    output = Path(shutil.copytree(killed, tmp_path / "run"))
    done = train(recipe, output, "checkpoint.resume=never", "training.max_steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(output)) == 2
    assert losses(output / "before-1") == losses(whole)[:7]
    assert (output / "before-1/checkpoints/step-6/manifest.json").exists()


def test_a_full_disk_costs_a_warning_and_not_the_run(recipe, whole, tmp_path):
    output = tmp_path / "run"
    limit = 100_000  # bytes per file: less than the weights, more than the log

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    program = command((TRAIN,), recipe, output, "training.max_steps=5")
    done = subprocess.run(
        program, env=environment(), preexec_fn=small_files, capture_output=True, text=True, timeout=300
    )
    assert "warning: no checkpoint of step 2" in done.stderr and "the next attempt is at step 3" in done.stderr, (
        done.stderr[-3000:]
    )
    assert len(losses(output)) == 5
    assert not list((output / "checkpoints").glob("step-*"))


def test_two_runs_on_one_folder(recipe, tmp_path):
    output = tmp_path / "run"
    program = command((TRAIN,), recipe, output, "training.max_steps=100000")
    first = subprocess.Popen(program, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in first.stdout:
            if line.startswith("  output "):  # it claims the folder next, long before the second one can
                break
        second = train(recipe, output)
        assert second.returncode == 2
        assert (
            str(first.pid) in second.stderr.splitlines()[-1] and os.uname().nodename in second.stderr.splitlines()[-1]
        )
    finally:
        first.kill()
        first.communicate()
    done = train(recipe, output, "training.max_steps=1", "checkpoint.resume=never")  # the first one may have saved
    assert done.returncode == 0, done.stderr[-3000:]
