"""`finetune generate`: ask a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.commands.libraries import load_libraries
from finetune.model.trained_folder import find


def generate(model: str, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print the answers of the model in folder (or hub id) `model`. Raises UserError when there is no such model."""
    found = find(model)
    load_libraries()
    from finetune.model.generation import answers

    for prompt, answer in zip(prompts, answers(found, prompts, max_new_tokens, temperature, seed), strict=True):
        print(f"> {prompt}\n{answer}\n" if len(prompts) > 1 else answer, flush=True)
