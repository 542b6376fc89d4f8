"""The model's tokenizer: loading, padding, the tokens that end an answer, the vocabulary that the data needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.launch.strategy import Strategy
from finetune.model.facts import ModelFacts, not_loadable, optional_packages, source_options
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_TEXT = "answer"


def load_tokenizer(loaded: LoadedRecipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError when the folder or hub id has none."""
    from transformers import AutoTokenizer

    section = loaded.recipe.model
    try:
        with optional_packages():
            tokenizer = AutoTokenizer.from_pretrained(section.name_or_path, **source_options(loaded))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(not_loadable(loaded, "tokenizer", error)) from error
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """The token id that fills rows up. What is trained is decided by position, so any id of the embedding serves.

    The tokenizer itself stays as it is: exported with eos as its pad token it would mislead the next trainer.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None and i < vocabulary), 0)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: what the chat template writes after an assistant turn, and eos."""
    from jinja2.exceptions import TemplateError

    stops = []
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": TURN_TEXT}]
        try:
            tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(TURN_TEXT)[2]
        except TemplateError:
            tail = ""
        added = tokenizer.added_tokens_decoder
        stops = [i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in added][:1]
    return list(dict.fromkeys(stops + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])))


def needed_vocabulary(
    loaded: LoadedRecipe,
    strategy: Strategy,
    model_facts: ModelFacts,
    tokenizer: PreTrainedTokenizerBase,
    max_token_id: int,
) -> int:
    """Rows the embedding must have for the data's token ids, up to `max_token_id`: ids outside make it grow.

    Raises UserError where new rows would not be trained, or it cannot grow. Padding never needs it: `padding_id`.
    """
    rows = model_facts.vocabulary
    if max_token_id < rows:
        return rows
    found = (
        f"{loaded.location('model.name_or_path')}: the tokenizer gives token id {max_token_id}"
        f" ({tokenizer.convert_ids_to_tokens(max_token_id)!r}), but the model's embedding ends at {rows - 1}"
    )
    if loaded.recipe.lora is not None:
        raise UserError(
            f"{found}, and with a lora section new rows would stay untrained. Use the tokenizer the model was"
            " trained with, or full fine-tuning, which lets the embedding grow."
        )
    if strategy.zero_stage == 3:
        raise UserError(
            f"{found}, and under ZeRO-3 it cannot grow. Use the tokenizer the model was trained with, ZeRO-2, or"
            " a copy of the model whose embedding has been resized."
        )
    return max(max_token_id, *tokenizer.get_vocab().values()) + 1
