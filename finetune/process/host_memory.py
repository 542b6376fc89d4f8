"""How much host memory the processes of this job may use, and who says so. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GIB = 2**30


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


def swap_bytes() -> int:
    """This machine's swap space: what a process may hold beyond the memory itself, slowly."""
    return int(psutil.swap_memory().total)


def kills_for_memory(file: Path = Path("/proc/vmstat")) -> int:
    """How often this machine's out-of-memory killer has killed a process, in any control group; 0 where unknown."""
    found = [line.split()[1] for line in _read(file).splitlines() if line.startswith("oom_kill ")]
    return int(found[0]) if found else 0


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
