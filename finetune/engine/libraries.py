"""What the libraries are told before they are imported."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from finetune.engine.devices import has_accelerator
from finetune.process.cpu_threads import cpu_threads


def prepare_libraries(use_cpu: bool = False, deterministic: bool = False) -> None:
    """Set what the libraries read at import, decide this rank's CPU threads, and keep warnings that no user can act on
    out of the terminal.

    Called before accelerate, transformers or DeepSpeed is imported, and before the first question for a device. With
    `deterministic`, an operation that adds up in another order from run to run is replaced, or raises RuntimeError with
    its name."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN, also where DeepSpeed pads its buffers
        torch.backends.cudnn.benchmark = False
    threads = cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # DeepSpeed's ops bring an OpenMP of their own, which reads it later
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
