"""`finetune export`: merge a LoRA adapter into its base, and prove that the merged folder answers like the pair."""

from __future__ import annotations

from pathlib import Path

from finetune.commands.libraries import load_libraries
from finetune.errors import UserError
from finetune.model.parameters import DTYPE_BYTES
from finetune.model.trained_folder import find


def merge_adapter(folder: Path, output: Path, dtype: str = "auto") -> str:
    """Write base + adapter as one full model to `output`; returns one line saying how well they agree.

    `dtype` auto is the one the base was held in. A base held in 4 bits is merged as its 4-bit values, which are what
    the adapter was trained on. Works in float32 on the CPU: host memory of 4 bytes per parameter, and the result beside
    it. Raises UserError (no adapter, output exists, dtype unknown) and BrokenExport when the logits differ.
    """
    if output.exists():
        raise UserError(f"{output}: exists already. Give a folder that does not, or delete it.")
    if dtype not in ("auto", *DTYPE_BYTES):
        raise UserError(f"--dtype is {dtype}; it must be auto, {', '.join(DTYPE_BYTES)}.")
    found = find(str(folder))
    if not found.adapter:
        raise UserError(f"{folder}: is a full model already, there is no adapter to merge.")
    load_libraries()
    from finetune.model.merge import merge

    return merge(found, output, dtype)


def export(folder: Path, output: Path, dtype: str) -> None:
    """Merge and print the line about it."""
    print(merge_adapter(folder, output, dtype), flush=True)
