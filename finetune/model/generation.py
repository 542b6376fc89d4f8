"""Answers of a trained model to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune.errors import UserError
from finetune.model import saved
from finetune.model.tokenizer import stop_token_ids
from finetune.model.trained_folder import Trained


def answers(
    found: Trained, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """The answers of a trained model, one text per prompt, without special tokens.

    With a chat template the prompt is what the user says; without one the model continues it. Temperature 0 is greedy;
    above, the answer is a function of (seed, position of the prompt). Raises UserError when it cannot be loaded.
    """
    tokenizer = saved.load_tokenizer(found)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network = saved.load(found, device)
    stops = stop_token_ids(tokenizer)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    # ours alone: the checkpoint's own would add its top_p, penalties and length limits
    network.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=stops[0] if stops else 0, **sampling
    )
    for number, prompt in enumerate(prompts):
        torch.manual_seed(seed + number)
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
        output = network.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        yield tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, ready to be continued. Raises UserError when the chat template refuses it."""
    if tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses the prompt: {error}") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written BOS already
    ids = tokenizer(prompt)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text: nothing could follow
        ids = ids[:-1]
    if not ids:
        raise UserError("the prompt is empty, and this model has no token to begin with. Give some text.")
    return ids
