"""One recipe, four kinds of hardware, one loss curve: the quick start's recipe on one rank, two ranks, ZeRO-3 offload
and two machines.

What differs is rounding. Two things had to be put right for that to hold, and are measured here on a model of a few
million parameters, where they show: torch adds up a gradient norm in float32 on the CPU, and DeepSpeed's CPU Adam
corrects its bias in float32."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from finetune.launch.start import free_port
from tests.support.forked import run, train
from tests.support.launch import CONFIGS, ROOT, environment, launch_file

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # nats per token
STEPS = 20
RECIPE = ROOT / "recipes" / "quickstart" / "sft.yaml"
# The recipe's own run, made small enough for a test: shorter chats, 8 of them per step, a held-out set of 30.
OVERRIDES = (
    f"training.max_steps={STEPS}",
    "training.adam_epsilon=1e-6",  # with 1e-8 AdamW makes rounding visible where gradients are next to nothing
    "training.global_batch_size=8",
    "training.per_device_train_batch_size=2",
    "data.max_length=64",
    "data.max_rows=300",
    "evaluation.eval_steps=10",
)
LAUNCHES = ("cpu", "cpu_2_ranks", "zero3_offload_cpu_2_ranks", "two machines")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> tuple[str, ...]:
    """The quick start's base model before its pre-training, and the first held-out chats."""
    folder = tmp_path_factory.mktemp("base")
    made = run([sys.executable, "-m", "scripts.quickstart.tiny_model", "--untrained-only", "--output", folder / "base"])
    assert made.returncode == 0, made.stderr
    heldout = folder / "heldout.jsonl"
    with (RECIPE.parent / "data" / "heldout.jsonl").open() as lines:
        heldout.write_text("".join(islice(lines, 30)))
    return (*OVERRIDES, f"model.name_or_path={folder / 'base-init'}", f"data.eval=[{{path: {heldout}}}]")


@pytest.fixture(scope="module")
def curves(overrides, tmp_path_factory) -> dict[str, list[tuple[int, str, float]] | str]:
    """(step, kind, loss) of every row of metrics.jsonl per launch, or why a launch is not possible here."""
    found: dict[str, list | str] = {}
    folder = tmp_path_factory.mktemp("runs")
    env = {"FINETUNE_CACHE": str(folder / "cache")}
    for name in LAUNCHES:
        output = folder / name.replace(" ", "_")
        arguments = (*overrides, f"output_dir={output}")
        if name == "two machines":
            try:
                on_two_machines(folder, arguments, env)
            except NoNamespaces as reason:
                found[name] = str(reason)
                continue
        else:
            done = train(CONFIGS / f"{name}.yaml", RECIPE, *arguments, cwd=folder, env=env)
            assert done.returncode == 0, done.stderr[-4000:]
        found[name] = losses(output)
        assert json.loads((output / "run.json").read_text())["status"] == "done"
        assert (output / "deepspeed.json").exists() == (name.startswith("zero") or name == "two machines")
    return found


def losses(output: Path) -> list[tuple[int, str, float]]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], kind, row[kind]) for row in rows for kind in ("loss", "eval_loss") if kind in row]


@pytest.mark.parametrize("name", LAUNCHES[1:])
def test_the_same_losses(curves, name):
    if isinstance(curves[name], str):
        pytest.skip(curves[name])
    plain = curves["cpu"]
    assert [row[:2] for row in curves[name]] == [row[:2] for row in plain]
    worst = max(abs(found[2] - wanted[2]) for found, wanted in zip(curves[name], plain, strict=True))
    assert worst <= TOLERANCE, list(zip(plain, curves[name], strict=True))


def test_the_curve_is_one_of_training(curves):
    plain = curves["cpu"]
    assert [step for step, kind, _ in plain if kind == "loss"] == list(range(1, STEPS + 1))
    held_out = {step: loss for step, kind, loss in plain if kind == "eval_loss"}
    assert list(held_out) == [0, 10, 20]
    assert held_out[20] < 0.8 * held_out[0]


class NoNamespaces(Exception):
    """Why two machines cannot be played on this one."""


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str, str, str]]:
    """Two network namespaces joined by a virtual cable: (name, name, interface, address of the first)."""
    if shutil.which("ip") is None:
        raise NoNamespaces("needs the command ip (iproute2)")
    if os.geteuid() != 0:
        raise NoNamespaces("needs root, for network namespaces")
    first, second = (f"finetune{os.getpid()}{side}" for side in "ab")
    cable, address = "ftcable", "10.213.47.1"  # seen by nobody outside the two namespaces
    try:
        for command in (
            f"netns add {first}",
            f"netns add {second}",
            f"link add {cable} netns {first} type veth peer name {cable} netns {second}",
            f"-n {first} addr add {address}/24 dev {cable}",
            f"-n {second} addr add 10.213.47.2/24 dev {cable}",
            *(f"-n {name} link set {device} up" for name in (first, second) for device in ("lo", cable)),
        ):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                raise NoNamespaces(f"network namespaces are not allowed here: ip {command}: {done.stderr.strip()}")
        yield first, second, cable, address
    finally:
        for name in (first, second):  # torchrun's ranks outlive a launcher that was killed
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_two_machines(folder: Path, arguments: tuple[str, ...], env: dict[str, str]) -> None:
    """scripts/launch_multinode.sh in each namespace, ZeRO-3 with one CPU rank per machine."""
    config = launch_file(folder / "two_machines.yaml", 2, zero_stage=3)
    port = free_port()
    with two_machines() as (first, second, cable, address):
        processes = []  # killed with the namespaces
        for rank, name in enumerate((first, second)):
            command = [
                "ip",
                "netns",
                "exec",
                name,
                ROOT / "scripts/launch_multinode.sh",
                "--machines",
                "2",
                "--rank",
                rank,
                "--address",
                address,
                "--port",
                port,
                "--processes",
                "1",
                "--config",
                config,
                RECIPE,
                *arguments,
            ]
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            with (folder / f"machine{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        cwd=folder,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment(**env, PATH=path, GLOO_SOCKET_IFNAME=cable),
                    )
                )
        codes = [process.wait(timeout=600) for process in processes]
    assert codes == [0, 0], "\n".join((folder / f"machine{rank}.log").read_text()[-3000:] for rank in (0, 1))
