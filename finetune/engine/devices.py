"""The device and the memory of this process: names and bytes. Changes nothing but torch's memory cache."""

from __future__ import annotations

import os
import resource
import sys

import psutil
import torch

from finetune.report.text import count


def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU."""
    return torch.accelerator.is_available()


def flash_device() -> torch.device | None:
    """This process's GPU, where it runs the flash attention kernels that torch brings: NVIDIA's from compute capability
    8.0 (A100) on; else None.
    """
    if not (has_accelerator() and torch.version.cuda):
        return None
    device = torch.device("cuda", max(0, int(os.environ.get("LOCAL_RANK", "0"))) % torch.cuda.device_count())
    return device if torch.cuda.get_device_capability(device) >= (8, 0) else None


def device_name() -> str:
    """The device people would name: the GPU's product name, or `CPU (n threads)`."""
    if has_accelerator():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        return module.get_device_name() if hasattr(module, "get_device_name") else str(module.__name__)
    threads = torch.get_num_threads()
    return f"CPU ({count(threads, 'thread')})"


def device_limit_bytes() -> int:
    """Memory of this process's device: the one of its local rank, also before Accelerate has chosen it.

    To ask another one would leave this process's context there, hundreds of megabytes from every rank on the first
    device."""
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return int(module.mem_get_info(max(0, int(os.environ.get("LOCAL_RANK", "0"))) % module.device_count())[1])


def device_peak_bytes() -> int:
    """Highest device memory allocated by this process so far, 0 where there is no device but the CPU."""
    return int(torch.accelerator.max_memory_allocated()) if has_accelerator() else 0


def empty_cache() -> None:
    """Give memory that no tensor holds back to the device, and begin its peak anew."""
    if has_accelerator():
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def host_bytes() -> int:
    """Resident set size of this process now."""
    return int(psutil.Process().memory_info().rss)


def host_peak_bytes() -> int:
    """Highest resident set size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
