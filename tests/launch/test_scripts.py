"""The multi-machine scripts: every value from arguments or SLURM, the same command whatever the working directory."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "launch_multinode.sh"


def run(folder, *arguments, script=SCRIPT, **variables):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environ = {**keep, **variables, "PATH": f"{folder}/bin:{keep['PATH']}"}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=30)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "bin").mkdir()
    return tmp_path


def tool(folder, name, text):
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def options(text):
    words = shlex.split(text)
    assert words[1] == "launch"
    return dict(zip(words[2::2], words[3::2], strict=False)), words[
        words.index(str(ROOT / "finetune" / "train.py")) + 1 :
    ]


def test_arguments(folder):
    done = run(
        folder,
        "--machines",
        "2",
        "--rank",
        "1",
        "--address",
        "10.0.0.1",
        "--port",
        "3333",
        "--processes",
        "4",
        "--dry-run",
        "recipe.yaml",
        "data.train=[{path: a b.jsonl}]",
    )
    assert done.returncode == 0, done.stderr
    given, rest = options(done.stdout)
    assert given["--config_file"] == str(ROOT / "accelerate_configs" / "multi_node_zero3_offload.yaml")
    assert (given["--num_machines"], given["--machine_rank"], given["--num_processes"]) == ("2", "1", "8")
    assert (given["--main_process_ip"], given["--main_process_port"]) == ("10.0.0.1", "3333")
    assert given["--deepspeed_multinode_launcher"] == "standard"
    assert rest == ["recipe.yaml", "data.train=[{path: a b.jsonl}]"]


def test_slurm_gives_everything(folder):
    tool(folder, "scontrol", "[ \"$3\" = 'node[7-8]' ] && printf 'node7\\nnode8\\n'")
    slurm = dict(
        SLURM_JOB_NUM_NODES="2",
        SLURM_NODEID="1",
        SLURM_JOB_NODELIST="node[7-8]",
        SLURM_JOB_ID="123456",
        SLURM_GPUS_ON_NODE="8",
    )
    done = run(folder, "--dry-run", "recipe.yaml", **slurm)
    given, _ = options(done.stdout)
    assert (given["--num_machines"], given["--machine_rank"], given["--num_processes"]) == ("2", "1", "16")
    assert (given["--main_process_ip"], given["--main_process_port"]) == ("node7", "23456")


def test_gpus_are_counted_where_nobody_says(folder):
    tool(folder, "nvidia-smi", "printf 'GPU 0: x\\nGPU 1: x\\nGPU 2: x\\n'")
    done = run(folder, "--machines", "2", "--rank", "0", "--address", "a", "--dry-run", "recipe.yaml")
    assert options(done.stdout)[0]["--num_processes"] == "6"


def test_the_config_is_a_file_or_a_name(folder):
    (folder / "mine.yaml").write_text("")
    base = ("--machines", "1", "--rank", "0", "--address", "a", "--processes", "2", "--dry-run")
    for config, found in (
        ("mine.yaml", "mine.yaml"),
        ("zero3", str(ROOT / "accelerate_configs/zero3.yaml")),
        ("zero3.yaml", str(ROOT / "accelerate_configs/zero3.yaml")),
    ):
        assert options(run(folder, *base, "--config", config, "recipe.yaml").stdout)[0]["--config_file"] == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no recipe given"),
        (("gone.yaml",), "recipe gone.yaml does not exist"),
        (("recipe.yaml",), "--machines is not known"),
        (("--machines",), "--machines needs a value"),
        (("--nodes", "2", "recipe.yaml"), "unknown option --nodes"),
        (("--config", "nothing", "recipe.yaml"), "neither a file nor a name"),
        (("--machines", "2", "--rank", "2", "--processes", "1", "--address", "a", "recipe.yaml"), "0 to 1"),
        (("--machines", "x", "--rank", "2", "--processes", "1", "recipe.yaml"), "--machines is 'x'"),
        (("--machines", "2", "--rank", "0", "--processes", "1", "recipe.yaml"), "--address is not known"),
    ],
)
def test_what_is_missing_or_wrong_is_named(folder, arguments, words):
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_help(folder):
    assert "--machines N" in run(folder, "--help").stdout


def test_the_sbatch_file_calls_it_once_per_node(folder):
    tool(folder, "srun", 'echo "$@"')
    script = ROOT / "scripts" / "launch.slurm"
    slurm = dict(SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="12")
    done = run(folder, "recipe.yaml", "training.seed=3", script=script, **slurm)
    called = f"--kill-on-bad-exit=1 --cpus-per-task=12 bash {SCRIPT} recipe.yaml training.seed=3"
    assert done.stdout.strip() == called
    text = script.read_text()
    assert "#SBATCH --ntasks-per-node=1" in text and "#SBATCH --nodes=2" in text


def test_the_early_signal_asks_the_run_to_save_and_queues_the_job_again(folder):
    tool(folder, "scontrol", f'echo "$@" >> {folder}/scontrol.log')
    tool(
        folder,
        "srun",
        f"""
touch {folder}/started
while [ ! -e "$FINETUNE_STOP_FILE" ]; do sleep 0.05; done
sleep 0.3
exit $(cat {folder}/status)""",
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environ |= {
        "PATH": f"{folder}/bin:{environ['PATH']}",
        "FINETUNE_ROOT": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": "/",
    }
    (folder / "scripts").mkdir()
    (folder / "scripts/launch_multinode.sh").touch()
    for status, queued in ((1, "requeue 77\n"), (0, "")):  # saved and ended; was done anyway
        (folder / "status").write_text(str(status))
        for left in ("started", "scontrol.log"):
            (folder / left).unlink(missing_ok=True)
        job = subprocess.Popen(["bash", str(ROOT / "scripts/launch.slurm"), "recipe.yaml"], env=environ, cwd=folder)
        while not (folder / "started").exists():
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == status
        log = folder / "scontrol.log"
        assert (log.read_text() if log.exists() else "") == queued
        assert not list(folder.glob(".finetune-stop*"))
