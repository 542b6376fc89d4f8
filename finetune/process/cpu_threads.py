"""How many CPU threads a rank computes with. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from finetune.errors import UserError

ASKED = "FINETUNE_CPU_THREADS"
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cpu_threads(local_ranks: int, quota: Path = CPU_QUOTA) -> int:
    """Threads of one rank: its share of the cores that this process may use, at least 1; $FINETUNE_CPU_THREADS where
    that is set.

    OMP_NUM_THREADS may lower the share. 1 does not count: torchrun and accelerate set it for every rank without being
    asked. Threads of all ranks never outnumber the cores, because OpenMP's threads then wait for each other most of the
    time. Raises UserError for a value that is no number."""
    asked = os.environ.get(ASKED)
    if asked is not None:
        if not asked.isdigit() or not int(asked):
            raise UserError(f"environment: {ASKED} is {asked!r}; it must be a whole number of at least 1.")
        return int(asked)
    share = max(1, usable_cores(quota) // local_ranks)
    omp = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(omp)) if omp.isdigit() and int(omp) > 1 else share


def usable_cores(quota: Path = CPU_QUOTA) -> int:
    """Physical cores of this machine, as many of them as affinity and the control group's quota leave."""
    found = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        found.append(len(os.sched_getaffinity(0)))
    try:
        most, period = quota.read_text().split()
        if most != "max":
            found.append(max(1, int(most) // int(period)))
    except (OSError, ValueError):
        pass
    return min(found)
