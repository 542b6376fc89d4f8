"""The trained model as a folder: gathered from every rank, written on rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.engine.engine import Engine
from finetune.model.save import write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(engine: Engine, tokenizer: PreTrainedTokenizerBase, dtype: str, folder: Path) -> None:
    """Gather the trained weights from every rank and write `folder` on rank 0. A collective. Raises BrokenExport."""
    model = engine.inner_model()
    state = engine.full_state_dict(only_trained=hasattr(model, "peft_config"))
    if engine.rank == 0:
        write_model(state, model, tokenizer, folder, dtype)
    engine.barrier()
