"""What machine and world this process is in: device, ranks, bytes. No side effects but `prepare_libraries`."""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from pathlib import Path

import psutil
import torch

from finetune.errors import UserError


def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU."""
    return torch.accelerator.is_available()


def device_name() -> str:
    """The device people would name: the GPU's product name, or `CPU (n threads)`."""
    if has_accelerator():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        return module.get_device_name() if hasattr(module, "get_device_name") else str(module.__name__)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads != 1 else ''})"


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


def prepare_libraries(use_cpu: bool = False, deterministic: bool = False) -> None:
    """Settle what the libraries read at import, and keep what no user can act on out of the terminal. The user sets
    nothing.

    Called before accelerate, transformers or DeepSpeed is imported, and before the first question for a device. With
    `deterministic`, an operation that adds up in another order from run to run is replaced, or raises RuntimeError with
    its name."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, also where DeepSpeed pads its buffers
        torch.backends.cudnn.benchmark = False
    if use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate hands use_cpu on to single processes only
    if not has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, and warns that it guessed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked after tokenising: avoids a warning per process
    # deprecations inside torch, accelerate, transformers and DeepSpeed calling each other
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # peft imports bitsandbytes whether or not it is used, which then asks for a CPU inference kernel that we never run
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if os.environ.get("RANK", "0") != "0":
        transformers_logging.set_verbosity_error()


def stale_compile_locks(root: Path | None = None) -> list[Path]:
    """Lock files of torch's extension builder that no living process of this host holds open.

    The builder waits for the lock of an op (`<op>/lock`, below a folder per Python version unless TORCH_EXTENSIONS_DIR
    is set) to vanish, for ever and without a word. A live owner keeps the file open (torch.utils.file_baton), so an
    owner that was killed is known for certain."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    locks = {p.resolve() for pattern in ("*/lock", "*/*/lock") for p in root.glob(pattern)}
    held = _open_files() if locks else set()
    return sorted(lock for lock in locks - held if lock.exists())  # else its owner was just done with it


def _open_files() -> set[Path]:
    found: set[Path] = set()
    for process in psutil.process_iter():
        try:
            found.update(Path(f.path) for f in process.open_files())
        except (psutil.Error, OSError):
            continue
    return found


def check_compile_locks() -> None:
    """Raises UserError naming stale lock files, before DeepSpeed's first import would hang on them."""
    stale = stale_compile_locks()
    if stale:
        raise UserError(
            "DeepSpeed: a build of its C++ ops was killed and left a lock behind; every later start would wait for it"
            " for ever. No process of this machine holds it. Remove it and start again:\n  rm "
            + " ".join(map(str, stale))
        )
