"""Bad input ends a run with one message that says what to change, exit status 2, and before weights are read.

Every recipe here names a model folder without weights: a run that got as far as loading them would say so.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.data import write_jsonl
from tests.support.launch import CONFIGS, TRAIN, environment, launch_file, run, train
from tests.support.tiny_models import small_recipe


@dataclass(frozen=True)
class Case:
    """Overrides of a good recipe, the words its message must hold, and what the launcher put into the environment."""

    overrides: tuple[str, ...]
    says: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    recipe: str = "recipe.yaml"


TWO_RANKS = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("ACCELERATE_DYNAMO_BACKEND", "no"))
EARLY = {  # answered before torch is imported
    "missing recipe": Case((), ("nowhere.yaml",), recipe="nowhere.yaml"),
    "no recipe": Case((), ("expected a recipe first", "accelerate launch"), recipe="--max-steps"),
    "missing data file": Case(
        ("data.train=[{path: ./nothing.jsonl}]",), ("data.train[0].path is", "there is no", "nothing.jsonl")
    ),
    "unknown model folder": Case(
        ("model.name_or_path=./no-model",), ("model.name_or_path is", "there is no", "no-model")
    ),
    "typo in a key": Case(("training.learning_rat=1e-4",), ("training.learning_rat is not a key", "learning_rate")),
    "typo in the file": Case((), ("typo.yaml:", "data.max_lenght is not a key", "max_length"), recipe="typo.yaml"),
    "a batch that does not divide": Case(
        ("training.global_batch_size=10", "training.per_device_train_batch_size=4", "data.packing=false"),
        ("training.global_batch_size is 10, but 4 rows x 2 ranks = 8 does not divide it. Use 8 or 16",),
        TWO_RANKS,
    ),
    "a size without a unit": Case(
        ("training.device_memory=40",), ("training.device_memory", "40 has no unit", "40GiB")
    ),
    "fp16 on the CPU": Case(
        (), ("fp16", "loss scaler", "bf16"), (("ACCELERATE_MIXED_PRECISION", "fp16"), ("ACCELERATE_USE_CPU", "true"))
    ),
    "clipping said twice": Case(
        ("training.max_grad_norm=0.5",),
        ("training.max_grad_norm is 0.5", "gradient_clipping 2"),
        (("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_GRADIENT_CLIPPING", "2.0")),
    ),
}
LATE = {  # need the libraries
    "wrong column": Case(("data.train=[{path: ./columns.jsonl}]",), ("columns.jsonl", "messages", "question")),
    "not one row fits": Case(
        ("training.per_device_train_batch_size=auto", "training.device_memory=100KiB"),
        ("not one row of", "100.0 KiB (training.device_memory 100KiB)", "finetune plan"),
    ),
    "model folder without a config": Case(("model.name_or_path=./empty",), ("model.name_or_path", "config.json")),
    "no weights": Case((), ("model.name_or_path", "weights cannot be loaded")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A good recipe, but for a model without weights; and the files that the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    small_recipe(folder)
    (folder / "base" / "model.safetensors").unlink()
    (folder / "empty").mkdir()
    write_jsonl(folder / "columns.jsonl", [{"question": "a", "answer": "b"}] * 3)
    text = (folder / "recipe.yaml").read_text()
    (folder / "typo.yaml").write_text(text.replace("max_length", "max_lenght"))
    return folder


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, what it printed, and what it left for `finetune train`."""

    code: int
    printed: str
    status: dict


def plain_process(folder: Path, name: str, case: Case) -> Ended:
    """The trainer in one plain process, as a launcher would start its rank 0."""
    status_file = folder / f"{name}.json"
    env = dict(case.env) | {"FINETUNE_STATUS_FILE": str(status_file), "FINETUNE_CACHE": str(folder / "cache")}
    done = run([sys.executable, TRAIN, case.recipe, *case.overrides], cwd=folder, env=env, timeout=400)
    return Ended(done.returncode, done.stdout + done.stderr, json.loads(status_file.read_text()))


def plain_processes(folder: Path, cases: dict[str, Case]) -> dict[str, Ended]:
    """Every case, two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(lambda name: plain_process(folder, name, cases[name]), cases), strict=True))


@pytest.fixture(scope="module")
def early(folder) -> dict[str, Ended]:
    return plain_processes(folder, EARLY)


@pytest.fixture(scope="module")
def late(folder) -> dict[str, Ended]:
    return plain_processes(folder, LATE)


def check(case: Case, end: Ended, folder: Path) -> None:
    """One message, the last thing printed; status 2; nothing written."""
    assert end.code == end.status["exit_code"] == 2, end.printed
    message = end.status["message"]
    assert all(words in message for words in case.says), message
    assert "\n" not in message, "one message"
    assert end.printed.endswith(message + "\n"), end.printed
    assert end.printed.count(message) == 1
    assert "Traceback" not in end.printed
    assert not (folder / "run").exists(), "nothing was claimed or written"


@pytest.mark.parametrize("name", EARLY)
def test_recipe_and_launch_errors_come_before_the_libraries(early, name, folder):
    check(EARLY[name], early[name], folder)
    assert "loading libraries" not in early[name].printed


@pytest.mark.slow
@pytest.mark.parametrize("name", LATE)
def test_data_and_model_errors_come_before_the_weights(late, name, folder):
    check(LATE[name], late[name], folder)
    assert ("weights" in late[name].status["message"]) == (name == "no weights")


def test_every_problem_of_a_recipe_at_once(folder):
    overrides = ("training.learning_rat=1e-4", "data.max_length=-1", "lora.r=big")
    end = plain_process(folder, "three", Case(overrides, ()))
    assert end.code == 2
    assert len(end.status["message"].splitlines()) == 3
    assert all(key in end.status["message"] for key in ("learning_rat ", "data.max_length", "lora.r"))


def launched(folder: Path, config: Path, recipe: Path, *overrides: str) -> Ended:
    status_file = folder / "status.json"
    env = {"FINETUNE_STATUS_FILE": str(status_file), "FINETUNE_CACHE": str(folder / "cache")}
    done = train(config, recipe, *overrides, cwd=folder, env=env)
    return Ended(done.returncode, done.stdout + done.stderr, json.loads(status_file.read_text()))


def check_launched(end: Ended, says: str) -> None:
    assert end.code == 1, "accelerate turns every failure into 1"
    assert end.status["exit_code"] == 2
    message = end.status["message"]
    assert says in message
    assert end.printed.count(message) == 1, "rank 0 speaks for all ranks"
    trainers, launchers = end.printed.split(message)
    assert "Traceback" not in trainers
    assert "finetune/" not in "".join(line for line in launchers.splitlines() if line.lstrip().startswith("File "))


@pytest.mark.slow
def test_two_ranks_that_do_not_divide_the_batch_say_so_once(folder, tmp_path):
    recipe = folder / "recipe.yaml"
    end = launched(
        tmp_path,
        CONFIGS / "cpu_2_ranks.yaml",
        recipe,
        "training.global_batch_size=6",
        "data.packing=false",
        f"output_dir={tmp_path / 'run'}",
    )
    check_launched(end, "training.global_batch_size is 6, but 2 rows x 2 ranks = 4 does not divide it.")


@pytest.mark.slow
def test_a_wrong_column_under_zero3_offload_is_said_once(folder, tmp_path):
    config = launch_file(tmp_path / "zero3.yaml", 2, zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    columns = f"data.train=[{{path: {folder / 'columns.jsonl'}}}]"
    end = launched(tmp_path, config, folder / "recipe.yaml", columns, f"output_dir={tmp_path / 'run'}")
    check_launched(end, "columns.jsonl")


@pytest.mark.slow
def test_two_processes_that_give_one_are_refused(folder, tmp_path):
    status_file = tmp_path / "status.json"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        TRAIN,
        folder / "recipe.yaml",
        f"output_dir={tmp_path / 'run'}",
    ]
    done = run(command, cwd=tmp_path, env={"FINETUNE_STATUS_FILE": str(status_file)}, timeout=400)
    status = json.loads(status_file.read_text())
    assert (done.returncode, status["exit_code"]) == (1, 2)
    assert "2 processes were asked for, but one process was started" in status["message"]
    assert "accelerate_configs/cpu_2_ranks.yaml" in status["message"]
    assert "loading libraries" not in done.stderr


def test_a_launch_file_that_starts_fewer_ranks_is_refused_before_the_launch(folder, tmp_path):
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\nmixed_precision: 'no'\n"
    )
    command = [sys.executable, "-m", "finetune", "train", folder / "recipe.yaml", "--launch", config]
    done = run(command, cwd=TRAIN.parents[1], timeout=300)
    assert done.returncode == 2
    assert "multi_cpu.yaml:1: distributed_type MULTI_CPU starts one process, always." in done.stderr


def test_launch_inside_a_launched_process_is_refused(folder):
    command = [sys.executable, "-m", "finetune", "train", folder / "recipe.yaml", "--launch", CONFIGS / "cpu.yaml"]
    done = run(command, cwd=TRAIN.parents[1], env=dict(TWO_RANKS), timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip() == "--launch: this process is already one rank of a launch. Drop it."


def test_a_log_level_in_the_environment_is_no_launch(folder):
    command = [sys.executable, "-m", "finetune", "train", folder / "typo.yaml", "--launch", CONFIGS / "cpu.yaml"]
    done = run(command, cwd=TRAIN.parents[1], env={"ACCELERATE_LOG_LEVEL": "info"}, timeout=300)
    assert done.returncode == 2
    assert "max_lenght is not a key" in done.stderr
    assert "ACCELERATE_LOG_LEVEL" not in environment(), "the tests themselves start clean"
