"""A signal from the kernel when this process's parent dies, so that no rank or worker is left behind. Linux only."""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def signal_on_parent_death(number: int, parent: int) -> bool:
    """Have the kernel send signal `number` to this process when its parent dies; on Linux only.

    `parent` is the parent's process id as the caller knew it. Returns whether that parent still runs: where it died
    before this call, no signal will come.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    return os.getppid() == parent
