"""The kinds of engine, chosen here and nowhere else, and their checkpoints where no engine runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from torch import Tensor

from finetune.engine import native
from finetune.engine.deepspeed import checkpoint
from finetune.engine.deepspeed import kind as deepspeed
from finetune.engine.state import readable

KINDS: dict[str, ModuleType] = {"single": native, "ddp": native, "deepspeed": deepspeed}


def read_trained(folder: Path, sharded: bool) -> dict[str, Tensor]:
    """The trained parameters in a checkpoint, whole, by their names in the Hugging Face (or peft) model. No process
    group.

    `folder` has been verified; `sharded` says that DeepSpeed wrote it: these come in float32. Raises UserError.
    """
    with readable(folder, checkpoint.SHARD_ERRORS if sharded else ()):
        return (deepspeed if sharded else native).read_trained(folder)


def convert_state(folder: Path, target: Path) -> None:
    """Make what a DeepSpeed engine saved into `folder` readable on any number of ranks, in the folder `target`. One
    process.

    Raises OSError, and UserError where a file does not hold what its name says.
    """
    with readable(folder):
        checkpoint.convert(folder, target)
