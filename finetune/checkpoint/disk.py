"""Whether the disk has room for a run's checkpoints and model, before it starts. Torch-free."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UserError
from finetune.process.host_memory import gib
from finetune.recipe.load import LoadedRecipe


def check_disk(
    loaded: LoadedRecipe,
    output_dir: Path,
    checkpoint_bytes: float,
    model_bytes: float,
    say: Callable[[str], None],
    free_bytes: int | None = None,
) -> None:
    """Raises UserError where not one checkpoint of this size fits, warns where fewer fit than the recipe keeps."""
    place = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free if free_bytes is None else free_bytes
    # of a killed save: the next one removes it
    rubbish = sum(map(_bytes_below, (output_dir / "checkpoints").glob("step-*.tmp")))
    free += rubbish
    limit = loaded.recipe.checkpoint.save_total_limit
    there = _bytes_below(output_dir / "checkpoints") - rubbish
    wanted = (limit + 1) * checkpoint_bytes + model_bytes - there
    where = f"{loaded.location('output_dir')}: output_dir {output_dir} has {gib(free)} GiB free"
    if free < checkpoint_bytes:
        raise UserError(
            f"{where}, and one checkpoint takes {gib(checkpoint_bytes)} GiB. Make room, or give an output_dir on"
            " another disk."
        )
    if free < wanted:
        say(
            f"warning: {where}, but checkpoint.save_total_limit {limit}, the next one before an older goes, and the"
            f" model take {gib(wanted)} GiB: saves will fail. Make room, or lower checkpoint.save_total_limit."
        )


def _bytes_below(folder: Path) -> int:
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another run may be pruning there, and will be found out later
                found += os.stat(os.path.join(parent, name)).st_size
    return found
