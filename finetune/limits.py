"""How much host memory and disk this process may use, and whether that can be enough. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GIB = 2**30


@dataclass(frozen=True)
class HostMemory:
    """Bytes that the processes of this job may hold together, and who says so."""

    limit_bytes: int
    source: str

    def __str__(self) -> str:
        return f"{self.limit_bytes / GIB:.3g} GiB ({self.source})"


def host_memory(root: Path = CGROUPS, own: Path = PROC) -> HostMemory:
    """The least of the machine's memory and the limits of this process's control groups, version 1 or 2, and those above them."""
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
            found += [HostMemory(int(text), f"{place / name}") for name in names if (text := _read(place / name)).isdigit()]
            if place == base:
                break
    return min(found, key=lambda memory: memory.limit_bytes)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
