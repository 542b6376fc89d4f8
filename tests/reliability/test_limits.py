"""Memory and disk: what cannot be enough is refused before weights are read, and memory that runs out is said in one
message.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from finetune.checkpoint.disk import check_disk
from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.launch.preflight import resolve
from finetune.memory.estimate import Estimate, estimate
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.verdict import host_range
from finetune.model.facts import read_facts
from finetune.process.host_memory import GIB, HostMemory, host_memory, swap_bytes
from finetune.recipe.load import load_recipe
from finetune.training.forecast import refuse_what_cannot_fit
from finetune.training.job import JobSpec
from tests.support.forked import run
from tests.support.launch import CONFIGS, TRAIN, program
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


@pytest.fixture(scope="module")
def billion(tmp_path_factory) -> Path:
    """A recipe whose model has 1.2 billion parameters by its config, in bfloat16, and no weights."""
    path = small_recipe(tmp_path_factory.mktemp("billion"), rows=100)
    enlarge(path, hidden_size=4096, intermediate_size=11008, num_hidden_layers=6, dtype="bfloat16")
    return path


def enlarge(recipe_path: Path, **sizes) -> None:
    """Change the config of a recipe's model, and take its weights away."""
    base = recipe_path.parent / "base"
    config = json.loads((base / "config.json").read_text())
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": sizes["hidden_size"] // 32}
    (base / "config.json").write_text(json.dumps(config | heads | sizes))
    (base / "model.safetensors").unlink()


ONE_ROW = "training.per_device_train_batch_size=1"


def plan_of(recipe_path: Path, config: str, *overrides: str) -> JobSpec:
    """As much of a plan as the check of memory looks at."""
    loaded, strategy = load_recipe(recipe_path, [ONE_ROW, *overrides]), read_launch_file(CONFIGS / config)
    settled = resolve(loaded, strategy)
    unknown = dict.fromkeys(("tokenizer", "data", "schedule"))
    return JobSpec(loaded, strategy, settled.batch, settled.max_grad_norm, read_facts(loaded), **unknown)


def estimated(plan: JobSpec, on_cpu: bool) -> Estimate:
    return estimate(plan.loaded, plan.facts, plan.strategy, MicroBatchShape(1, 8), 2, on_cpu)


@pytest.mark.parametrize(
    ("config", "overrides", "on_cpu", "least", "most"),
    [
        ("cpu.yaml", (), True, 16, 17),  # weight, gradient and two moments in float32
        ("cpu_2_ranks.yaml", (), True, 28, 34),  # the same on each; what an engine holds is arithmetic: 10 % off
        ("cpu_2_ranks.yaml", ("training.optim=sgd",), True, 14, 20),
        ("cpu.yaml", ("lora.r=8",), True, 0, 1),  # the base's pages are the file's, and the kernel can drop them
        ("single_gpu.yaml", (), False, 3.8, 8),  # read on the host, in float32; AdamW's moments when it saves
        ("single_gpu.yaml", ("model.dtype=float32",), False, 0, 8),  # the file's own type: nothing is copied to read it
        ("zero2_offload.yaml", (), False, 31, 34),  # read whole by eight ranks
        ("zero3.yaml", (), False, 0, 5),  # shards on the devices; rank 0 gathers the export
        ("zero3_offload.yaml", (), False, 17, 40),  # and what is pinned takes a power of two
    ],
)
def test_what_is_surely_needed_of_the_host_per_parameter(billion, config, overrides, on_cpu, least, most):
    plan = plan_of(billion, config, *overrides)
    found = estimated(plan, on_cpu)
    assert found.traced
    assert least <= host_range(found, plan.strategy).low / found.weights.elements <= most


def test_too_much_is_refused_with_its_source_and_the_changes_that_help_and_perhaps_too_much_is_a_warning(billion):
    plan = plan_of(billion, "cpu_2_ranks.yaml")
    found, said = estimated(plan, on_cpu=True), []
    need = host_range(found, plan.strategy)
    swap = swap_bytes()
    with pytest.raises(UserError) as refused:
        refuse_what_cannot_fit(plan, found, said.append, HostMemory(int(need.low - swap) - GIB, "a test"))
    (text,) = refused.value.messages
    figures = r"this run needs at least [\d.]+ GiB of host memory \(2 ranks x [\d.]+ GiB, most at the [\w ]+: .*"
    assert re.search(figures + r"parameters [\d.]+.*\); the limit is [\d.]+ GiB \(a test\)\.", text), text
    assert (
        "set zero_stage to 2 in the launch file: the ranks share gradients and optimizer states; " in text
        and "train adapters (a lora section)" in text
    )
    assert "offload" not in text and "finetune plan" in text and said == []
    refuse_what_cannot_fit(plan, found, said.append, HostMemory(int(need.high) + GIB, "a test"))
    assert said == []
    refuse_what_cannot_fit(plan, found, said.append, HostMemory(int(need.expected) - GIB // 2, "a test"))
    assert len(said) == 1 and said[0].startswith("warning: ") and "this run needs about" in said[0]


def test_a_device_that_is_too_small_is_refused_with_changes_that_help_there(billion):
    plan, plenty = plan_of(billion, "zero2.yaml"), HostMemory(2**50, "a test")
    found, said = estimated(plan, on_cpu=False), []
    with pytest.raises(UserError) as refused:
        refuse_what_cannot_fit(plan, found, said.append, plenty, device_bytes=int(found.device.low) - GIB // 8)
    (text,) = refused.value.messages
    assert re.search(r"this run needs at least [\d.]+ GiB of device memory \(1 rank x [\d.]+ GiB, most at the ", text)
    for change in (
        "zero3.yaml: the ranks share",
        "offload_optimizer_device to cpu in the launch file: gradients and",
    ):
        assert change in text
    assert said == []
    close = int(found.device_needed.expected) - GIB // 8
    refuse_what_cannot_fit(plan, found, said.append, plenty, device_bytes=close)
    assert len(said) == 1 and "this run needs about" in said[0]


def test_a_disk_without_room_for_one_checkpoint_is_refused_and_for_fewer_than_asked_is_a_warning(small, tmp_path):
    loaded = load_recipe(small, ["checkpoint.save_total_limit=2"])
    said: list[str] = []
    sizes = {"checkpoint_bytes": 12 * 10**9, "model_bytes": 2 * 10**9, "say": said.append}
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
    enlarge(path, hidden_size=65536, intermediate_size=262144, num_hidden_layers=200)
    done = run([sys.executable, TRAIN, path], env={"FINETUNE_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.rstrip().splitlines()[-1]
    assert (
        re.search(r"this run needs at least 20\d,\d{3} GiB of host memory \(1 rank x ", last)
        and "train adapters (a lora section)" in last
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
        r"window 1 \(after step 0\), micro-batch 1 of 1, rows [\d, .]+ \(1 x \d+ tokens\): out of host memory"
        r" allocating \d.* [KM]iB\.",
        last,
    )
    assert re.search(r"holds parameters 128\.6 KiB, gradients \d.*, optimizer states 0 B, other \d", last)
    assert last.endswith(
        "Set training.per_device_train_batch_size to 32: micro-batches of at most 2,048 tokens, the same update."
    )
    assert "Traceback" not in done.stderr
    document = json.loads((output / "run.json").read_text())
    assert (document["status"], document["exit_code"], document["message"]) == ("failed", 2, last)
