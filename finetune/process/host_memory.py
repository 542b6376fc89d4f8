"""How much host memory and disk this process may use, and whether that can be enough. Torch-free."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetune.errors import UserError
from finetune.launch.strategy import Strategy
from finetune.recipe.load import Loaded
from finetune.report.text import count

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GIB = 2**30
CLOSE = 0.85  # of the limit: the lower bound leaves out activations, buffers and the data
LIBRARIES_BYTES = 200 * 2**20  # per process: Python, torch and transformers alone
MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}  # per trained parameter


def gib(size: float) -> str:
    """Bytes as a number of GiB, three digits or more."""
    return f"{size / GIB:,.0f}" if size >= 100 * GIB else f"{size / GIB:.3g}"


@dataclass(frozen=True)
class HostMemory:
    """Bytes that the processes of this job may hold together, and who says so."""

    limit_bytes: int
    source: str

    def __str__(self) -> str:
        return f"{gib(self.limit_bytes)} GiB ({self.source})"


def host_memory(root: Path = CGROUPS, own: Path = PROC) -> HostMemory:
    """The host memory limit: the least of the machine's memory and the limits of this process's control groups.

    Control groups of version 1 and 2, and those above them.
    """
    found = [HostMemory(psutil.virtual_memory().total, "this machine's memory")]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes",) if controllers else ("memory.max", "memory.high")
        folder = base / path.lstrip("/")
        # inside a container the path may be the host's: the container's own limits are then at the root
        for place in (folder, *folder.parents):
            for file in [place / name for name in names]:
                if (text := _read(file)).isdigit():
                    found.append(HostMemory(int(text), str(file)))
            if place == base:
                break
    return min(found, key=lambda memory: memory.limit_bytes)


def kills_for_memory(file: Path = Path("/proc/vmstat")) -> int:
    """How often this machine's out-of-memory killer has killed a process, in any control group; 0 where unknown."""
    found = [line.split()[1] for line in _read(file).splitlines() if line.startswith("oom_kill ")]
    return int(found[0]) if found else 0


@dataclass(frozen=True)
class Need:
    """A lower bound of what one process keeps in host memory, bytes by what it is."""

    parts: dict[str, float]

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return " + ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size >= 0.005 * GIB)


def host_need(loaded: Loaded, strategy: Strategy, parameters: int, export_dtype: str, use_cpu: bool) -> Need:
    """A lower bound of the host memory of each process, for a model of so many parameters; adapters count as nothing.

    Trained weights are read on the host, whole by every process except under ZeRO-3, and become float32; frozen ones in
    the checkpoint's own type stay pages of its files, which the kernel can drop. On the CPU, and with offload,
    gradients and optimizer states are in host memory too: float32, ZeRO's share of them. On a GPU, and where DeepSpeed
    casts them, the float32 weights have left the host before there are optimizer states: the larger need counts.
    """
    recipe = loaded.recipe
    trained = 0 if recipe.lora else parameters
    stage, ranks = strategy.zero_stage, strategy.ranks
    if stage == 3:  # zero.Init copies each rank's share, in the compute type
        share = parameters * (2 if strategy.mixed_precision != "no" else 4) / ranks
        weights = share if use_cpu or strategy.offload_param == "cpu" else 0.0
    elif trained:
        weights = 4.0 * trained if use_cpu or export_dtype != "float32" else 0.0
    else:
        weights = parameters / 2 if recipe.model.load_in_4bit and use_cpu else 0.0
    keeps = "cpu" if use_cpu else strategy.offload_optimizer
    # what is offloaded has its float32 copy there
    states = MOMENTS_BYTES[recipe.training.optim] + (0 if use_cpu else 4)
    moments = states * trained / (ranks if stage else 1) if keeps == "cpu" else 0.0
    gradients = 4 * trained / (ranks if stage >= 2 or not use_cpu else 1) if keeps == "cpu" else 0.0
    stay = weights
    if stage < 3 and trained and not use_cpu:
        stay = 0.0
    elif stage in (1, 2) and trained and strategy.mixed_precision != "no":
        stay = 2.0 * trained
    loading = Need({"libraries": LIBRARIES_BYTES, "weights": weights})
    training = Need({"libraries": LIBRARIES_BYTES, "weights": stay, "gradients": gradients, "optimizer": moments})
    return max(loading, training, key=lambda need: need.total_bytes)


def check_host(
    loaded: Loaded, strategy: Strategy, need: Need, say: Callable[[str], None], memory: HostMemory | None = None
) -> None:
    """Before weights are read: raises UserError where they cannot fit into host memory, and warns where it is close."""
    memory = memory or host_memory()
    local = strategy.local_ranks
    total = need.total_bytes * local
    if total < CLOSE * memory.limit_bytes:
        return
    key = "model.name_or_path"
    text = (
        f"{loaded.where(key)}: {key} is {loaded.recipe.model.name_or_path}: this run needs at least {gib(total)} GiB of"
        f" host memory ({count(local, 'process', 'es')} x {gib(need.total_bytes)} GiB: {need}); the limit is {memory}."
    )
    changes = ["train adapters (a lora section)"] if loaded.recipe.lora is None else ["load_in_4bit with a GPU"]
    if strategy.zero_stage < 3 and local > 1:
        changes.append("share the weights between the ranks (accelerate_configs/zero3_offload.yaml)")
    changes.append("a smaller model, more machines, or a higher memory limit")
    advice = f" Change one of: {'; '.join(changes)}."
    if total > memory.limit_bytes + psutil.swap_memory().total:
        raise UserError(text + advice)
    say(f"warning: {text} Activations and data come on top: it may be killed." + advice)


def check_disk(
    loaded: Loaded,
    output_dir: Path,
    trained: int,
    export_bytes: int,
    say: Callable[[str], None],
    free_bytes: int | None = None,
) -> None:
    """Before training: raises UserError where no checkpoint fits on the disk, warns where fewer fit than asked for."""
    place = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free if free_bytes is None else free_bytes
    # of a killed save: the next one removes it
    rubbish = sum(map(_bytes_below, (output_dir / "checkpoints").glob("step-*.tmp")))
    free += rubbish
    one = (4 + MOMENTS_BYTES[loaded.recipe.training.optim]) * trained
    limit = loaded.recipe.checkpoint.save_total_limit
    there = _bytes_below(output_dir / "checkpoints") - rubbish
    wanted = (limit + 1) * one + export_bytes - there
    where = f"{loaded.where('output_dir')}: output_dir {output_dir} has {gib(free)} GiB free"
    if free < one:
        raise UserError(
            f"{where}, and one checkpoint takes {gib(one)} GiB. Make room, or give an output_dir on another disk."
        )
    if free < wanted:
        say(
            f"warning: {where}, but checkpoint.save_total_limit {limit}, the next one before an older goes, and the"
            f" model take {gib(wanted)} GiB: saves will fail. Make room, or lower checkpoint.save_total_limit."
        )


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _bytes_below(folder: Path) -> int:
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another run may be pruning there, and will be found out later
                found += os.stat(os.path.join(parent, name)).st_size
    return found
