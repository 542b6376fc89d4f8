"""What a launched process can know: the environment accelerate really makes, and the launcher's command line."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import asked, is_launcher, requested
from finetune.launch.strategy import Strategy, one_process

ROOT = Path(__file__).resolve().parents[2]
PROBE = """\
import dataclasses, json, os, sys
import psutil
sys.path.insert(0, {root!r})
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import asked
from finetune.errors import UserError
def strategy(file):
    try:
        return dataclasses.asdict(from_environment(os.environ, file))
    except UserError as error:
        return str(error)
parents = [(p.cmdline(), p.cwd()) for p in psutil.Process().parents()[:2]]
ranks, config = asked(parents, os.environ)
with open(os.path.join(sys.argv[1], os.environ.get("RANK", "0") + ".json"), "w") as f:
    json.dump([ranks, config, strategy(config), strategy(None)], f)
"""


def start(folder, options, port):
    """Runs the probe under `accelerate launch`; returns each rank's (asked, file, strategy with it, without it)."""
    folder.mkdir()
    (folder / "probe.py").write_text(PROBE.format(root=str(ROOT)))
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    if "--cpu" not in options:
        command += ["--main_process_port", str(port)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    command += ["probe.py", str(folder)]
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, timeout=120)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_real_launches_are_seen_as_what_they_are(tmp_path):
    nvme = tmp_path / "nvme.yaml"
    text = (ROOT / "accelerate_configs" / "zero3_nvme.yaml").read_text()
    nvme.write_text(text.replace("use_cpu: false", "use_cpu: true").replace("mixed_precision: bf16", ""))
    cases = {
        "plain": ["--cpu", "--num_processes", "2"],
        "cpu_2_ranks": ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2_ranks.yaml")],
        "zero3_nvme": ["--config_file", str(nvme), "--num_processes", "1"],
    }
    with ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(start, tmp_path / name, options, free_port()) for name, options in cases.items()}
    seen = {name: run.result() for name, run in runs.items()}

    # accelerate starts one process for two asked for; only its command line tells
    ((asked, config, strategy, _),) = seen["plain"]
    assert (asked, config, strategy["ranks"], strategy["use_cpu"]) == (2, None, 1, True)

    assert len(seen["cpu_2_ranks"]) == 2
    for wanted, config, strategy, alone in seen["cpu_2_ranks"]:
        assert wanted == strategy["ranks"] == 2
        assert strategy["source"] == config
        # the environment alone does not say that the CPU was asked for
        assert (strategy["engine"], strategy["use_cpu"], alone["use_cpu"]) == ("ddp", True, False)
        assert strategy["mixed_precision"] == "no"

    # accelerate drops the NVMe folders
    ((wanted, _, strategy, alone),) = seen["zero3_nvme"]
    assert (wanted, strategy["ranks"], strategy["nvme_path"]) == (1, 1, "/local_nvme")
    assert "NVMe offload without a folder" in alone


def test_zero3_environment_gives_the_strategy_of_its_file(tmp_path):
    name = ROOT / "accelerate_configs" / "zero3_offload_cpu_2_ranks.yaml"
    ranks = start(tmp_path / "run", ["--config_file", str(name)], free_port())
    assert len(ranks) == 2
    for wanted, config, strategy, alone in ranks:
        assert (wanted, config) == (2, str(name))
        assert Strategy(**strategy) == read_launch_file(name)
        assert {**alone, "source": str(name), "use_cpu": True} == strategy


DEEPSPEED = {
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}


def test_a_plain_process_is_one_process():
    assert from_environment({}) == one_process()
    assert from_environment({"WORLD_SIZE": "4"}) == one_process()  # set by the cluster, not by a launcher


def test_machines_and_recipe_owned_knobs_come_from_the_environment():
    knobs = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    strategy = from_environment({**DEEPSPEED, **knobs})
    assert (strategy.ranks, strategy.machines, strategy.zero_stage, strategy.mixed_precision) == (8, 2, 3, "bf16")
    assert (strategy.gradient_accumulation_steps, strategy.gradient_clipping) == (4, 0.5)
    auto = from_environment({**DEEPSPEED, **dict.fromkeys(knobs, "auto")})
    assert (auto.gradient_accumulation_steps, auto.gradient_clipping) == (None, None)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision is fp8"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "NVMe offload without a folder"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "high"}, "is not a number"),
    ],
)
def test_environments_that_we_do_not_run_are_refused(extra, words):
    with pytest.raises(UserError, match=words):
        from_environment({**DEEPSPEED, **extra})


def test_the_nvme_folder_comes_from_the_launch_file():
    nvme = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "nvme" for what in ("OPTIMIZER", "PARAM")}
    strategy = from_environment({**DEEPSPEED, **nvme}, ROOT / "accelerate_configs" / "zero3_nvme.yaml")
    assert (strategy.offload_optimizer, strategy.nvme_path) == ("nvme", "/local_nvme")
    by_hand = {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/disk"}
    assert from_environment({**DEEPSPEED, **nvme, **by_hand}).nvme_path == "/disk"


@pytest.mark.parametrize(
    ("line", "ranks", "config"),
    [
        ("python /v/bin/accelerate launch --cpu --num_processes 2 train.py --num_processes 5", 2, None),
        ("/v/bin/accelerate launch --num-processes=4 --config_file x.yaml train.py", 4, "x.yaml"),
        ("accelerate-launch --config-file x.yaml --quiet -m finetune train", None, "x.yaml"),
        ("python -u -m accelerate.commands.launch --multi_gpu --num_processes 3 t.py", 3, None),
        ("python -m accelerate.commands.accelerate_cli launch --num_processes 3 t.py", 3, None),
        ("python -m torch.distributed.run --nproc_per_node 2 t.py", 2, None),
        ("torchrun --nproc-per-node=2 --nnodes 1:3 --standalone -m x --nproc_per_node 9", 6, None),
        ("torchrun --nproc 2 t.py", 2, None),
        ("torchrun --nproc_per_node auto t.py", None, None),
        ("torchrun t.py", 1, None),
        ("python train.py accelerate launch --num_processes 2", None, None),
        ("python -m pytest torchrun --nproc_per_node 2", None, None),
        ("bash -c 'accelerate launch'", None, None),
    ],
)
def test_what_a_launcher_was_asked_for(line, ranks, config):
    assert requested(line.split()) == (ranks, config)
    if "train.py accelerate" in line or "pytest" in line or "bash" in line:
        assert not is_launcher(line.split())


def test_the_variable_wins_over_the_command_line():
    environ = {"FINETUNE_REQUESTED_PROCESSES": "7", "PET_NPROC_PER_NODE": "3"}
    assert requested(["torchrun", "t.py"], environ) == (7, None)
    assert requested(["torchrun", "t.py"], {"PET_NPROC_PER_NODE": "3"}) == (3, None)
    assert requested([], environ) == (7, None)


def test_only_the_nearest_launcher_counts_and_its_file_says_how_many(tmp_path):
    two = str(ROOT / "accelerate_configs" / "cpu_2_ranks.yaml")
    outer = ["torchrun", "--nproc-per-node", "9", "x.py"]
    inner = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_2_ranks.yaml", "t.py"]
    chain = [(["python", "t.py"], "/"), (inner, str(ROOT)), (outer, "/")]
    assert asked(chain, {}) == (2, two)
    assert asked(chain[:1], {}) == (None, None)
    bad = tmp_path / "multi_cpu.yaml"
    bad.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n")
    with pytest.raises(UserError, match="multi_cpu.yaml:1: distributed_type MULTI_CPU starts one process"):
        asked([(["accelerate", "launch", "--config_file", str(bad), "t.py"], "/")], {})


def test_the_users_default_file_counts_where_accelerate_reads_it(tmp_path):
    (tmp_path / "accelerate").mkdir()
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    environ = {"HF_HOME": str(tmp_path)}
    assert asked([(["accelerate", "launch", "t.py"], "/")], environ) == (3, str(default))
    assert asked([(["accelerate", "launch", "--cpu", "t.py"], "/")], environ) == (None, None)
