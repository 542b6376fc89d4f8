"""Memory and disk: what cannot be enough is refused before weights are read, and memory that runs out is said in one
message.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.process.host_memory import GIB, HostMemory, Need, check_disk, check_host, host_memory, host_need
from finetune.recipe.load import load_recipe
from tests.support.launch import CONFIGS, TRAIN, program, run
from tests.support.tiny_models import small_recipe


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("limits"), rows=100)


# ---- the limit


def control_groups(folder: Path, own: str, limits: dict[str, str]) -> dict:
    """A tree of control groups as the kernel shows it, and the file that says where this process is in it."""
    for name, text in limits.items():
        file = folder / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (folder / "own").write_text(own)
    return {"root": folder / "groups", "own": folder / "own"}


def test_the_least_limit_of_version_2_counts_wherever_it_stands(tmp_path):
    tree = control_groups(
        tmp_path,
        "0::/job/step\n",
        {"job/memory.max": "max", "job/memory.high": str(3 * GIB), "job/step/memory.max": str(5 * GIB)},
    )
    assert host_memory(**tree).limit_bytes == 3 * GIB
    assert host_memory(**tree).source.endswith("groups/job/memory.high")


def test_version_1_and_a_container_that_sees_its_own_group_at_the_root(tmp_path):
    own = "5:cpu:/docker/x\n4:memory:/docker/x\n0::/\n"
    tree = control_groups(tmp_path, own, {"memory/memory.limit_in_bytes": str(2 * GIB), "memory.max": "max"})
    assert host_memory(**tree).limit_bytes == 2 * GIB


def test_no_limit_is_the_machines_memory(tmp_path):
    tree = control_groups(
        tmp_path, "0::/a\n", {"a/memory.max": "max", "memory/memory.limit_in_bytes": str(2**63 - 4096)}
    )
    assert host_memory(**tree).source == "this machine's memory"
    assert host_memory(tmp_path / "nothing", tmp_path / "nowhere").source == "this machine's memory"


# ---- what is needed


def bytes_per_parameter(small: Path, config: str, *overrides: str, use_cpu: bool) -> float:
    loaded, strategy = load_recipe(small, list(overrides)), read_launch_file(CONFIGS / config)
    need = host_need(loaded, strategy, 10**9, "bfloat16", use_cpu)
    return (need.total_bytes - need.parts["libraries"]) / 10**9 * strategy.ranks


def test_bytes_per_parameter_over_all_ranks(small):
    assert bytes_per_parameter(small, "cpu.yaml", use_cpu=True) == 16  # weight, gradient and two moments in float32
    assert bytes_per_parameter(small, "cpu_2_ranks.yaml", use_cpu=True) == 32
    assert bytes_per_parameter(small, "cpu_2_ranks.yaml", "training.optim=sgd", use_cpu=True) == 16
    assert bytes_per_parameter(small, "cpu_2_ranks.yaml", "lora.r=8", use_cpu=True) == 0, (
        "the kernel can drop the file's pages"
    )
    assert bytes_per_parameter(small, "zero3_offload_cpu_2_ranks.yaml", use_cpu=True) == 16
    assert bytes_per_parameter(small, "single_gpu.yaml", use_cpu=False) == 4, "read on the host, in float32"
    assert bytes_per_parameter(small, "zero2_offload.yaml", use_cpu=False) == 32, (
        "eight times read; gone before 8 x 2 bytes of states come"
    )
    assert bytes_per_parameter(small, "zero3.yaml", use_cpu=False) == 0
    # bf16 weight, gradient, master, two moments
    assert bytes_per_parameter(small, "zero3_offload.yaml", use_cpu=False) == 18


def test_too_much_is_refused_and_close_is_a_warning(small):
    loaded, strategy = load_recipe(small, []), read_launch_file(CONFIGS / "cpu_2_ranks.yaml")
    need = Need({"libraries": 0, "weights": 50 * 2**40})
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"at least 102,400 GiB of host memory \(2 processes x 51,200 GiB: weights 51,200\)"
    ):
        check_host(loaded, strategy, need, said.append)
    check_host(loaded, strategy, need, said.append, HostMemory(130 * 2**40, "a test"))
    assert said == []
    check_host(loaded, strategy, need, said.append, HostMemory(105 * 2**40, "a test"))
    assert (
        len(said) == 1 and said[0].startswith("warning: ") and "(a test)" in said[0] and "zero3_offload.yaml" in said[0]
    )


def test_a_disk_without_room_for_one_checkpoint_is_refused_and_for_fewer_than_asked_is_a_warning(small, tmp_path):
    loaded = load_recipe(small, ["checkpoint.save_total_limit=2"])
    said: list[str] = []
    sizes = {"trained": 10**9, "export_bytes": 2 * 10**9, "say": said.append}
    with pytest.raises(UserError, match=rf"output_dir {tmp_path} has 10.2 GiB free, and one checkpoint takes 11.2 GiB"):
        check_disk(loaded, tmp_path, free_bytes=11 * 10**9, **sizes)
    check_disk(loaded, tmp_path, free_bytes=38 * 10**9, **sizes)
    assert said == []
    (tmp_path / "checkpoints/step-4.tmp").mkdir(parents=True)
    with open(tmp_path / "checkpoints/step-4.tmp/half", "wb") as half:
        half.truncate(27 * 10**9)  # without blocks on the disk
    check_disk(loaded, tmp_path, free_bytes=11 * 10**9 + 10**8, **sizes)
    (tmp_path / "checkpoints/step-4.tmp/half").unlink()
    said.clear()
    check_disk(loaded, tmp_path, free_bytes=37 * 10**9, **sizes)
    assert len(said) == 1 and "checkpoint.save_total_limit 2" in said[0] and "35.4 GiB" in said[0]


@pytest.mark.slow
def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(tmp_path):
    path = small_recipe(tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    big = dict(
        hidden_size=65536,
        intermediate_size=262144,
        num_hidden_layers=200,
        num_attention_heads=64,
        num_key_value_heads=64,
    )
    (tmp_path / "base/config.json").write_text(json.dumps(config | big))
    (tmp_path / "base/model.safetensors").unlink()
    done = run([sys.executable, TRAIN, path], env={"FINETUNE_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.rstrip().splitlines()[-1]
    assert (
        re.search(r"this run needs at least 15\d,\d{3} GiB of host memory \(1 process x ", last)
        and "Change one of: train adapters" in last
    )
    assert "Traceback" not in done.stderr and "cannot be loaded" not in done.stderr
    assert not (tmp_path / "run").exists()


# ---- when it runs out


@pytest.mark.slow
def test_out_of_memory_is_one_message_with_the_smallest_change(small, tmp_path):
    output = tmp_path / "run"
    sizes = ["training.global_batch_size=64", "training.per_device_train_batch_size=64", "training.max_steps=4"]
    done = run(
        [sys.executable, *program("tight_train"), "1", small, *sizes, f"output_dir={output}"],
        env={"FINETUNE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.rstrip().splitlines()[-1]
    assert re.match(
        r"window 1 \(after step 0\), micro-batch 1 of 1, rows [\d, .]+ \(64 x 64 tokens\): out of host memory"
        r" allocating \d.* [KM]iB\.",
        last,
    )
    assert re.search(r"holds parameters 128\.6 KiB, gradients \d.*, optimizer states 0 B, other \d", last)
    assert last.endswith(
        "Set training.per_device_train_batch_size to 32: 32 rows x K=2 x 1 rank = 64 rows per step as before, the same"
        " update."
    )
    assert "Traceback" not in done.stderr
    document = json.loads((output / "run.json").read_text())
    assert (document["status"], document["exit_code"], document["message"]) == ("failed", 2, last)
