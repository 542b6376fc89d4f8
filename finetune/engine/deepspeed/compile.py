"""DeepSpeed's C++ ops: which ones will be compiled, and the locks that a killed build leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil

from finetune.engine.devices import has_accelerator
from finetune.errors import UserError
from finetune.launch.strategy import Strategy


def op_is_built(name: str) -> bool:
    """Whether one of DeepSpeed's C++ ops has been compiled on this machine before."""
    from torch.utils.cpp_extension import _get_build_directory

    return (Path(_get_build_directory(name, verbose=False)) / f"{name}.so").exists()


def announce_compiles(strategy: Strategy, say: Callable[[str], None]) -> None:
    """Say which C++ ops DeepSpeed is going to compile, once per machine: minutes of silence otherwise."""
    ops = [] if has_accelerator() or strategy.ranks == 1 else ["deepspeed_shm_comm"]
    ops += ["cpu_adam"] if strategy.offload_optimizer != "none" else []
    ops += ["async_io"] if "nvme" in (strategy.offload_optimizer, strategy.offload_param) else []
    missing = [op for op in ops if not op_is_built(op)]
    if missing:
        say(f"DeepSpeed compiles {', '.join(missing)} once on this machine; this takes a minute or two each ...")


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
