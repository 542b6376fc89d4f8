"""What a prompt becomes before a trained model sees it."""

from __future__ import annotations

import pytest
from tokenizers import processors

from finetune.errors import UserError
from finetune.model.generation import prompt_ids
from finetune.model.tokenizer import stop_token_ids
from tests.support.data import CHATML, LLAMA3, MISTRAL, make_tokenizer


def test_the_prompt_ends_where_the_assistant_begins():
    tokenizer = make_tokenizer(CHATML)
    assert (
        tokenizer.decode(prompt_ids(tokenizer, "Hello")) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_template_writes_bos_and_nothing_doubles_it():
    tokenizer = make_tokenizer(LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    assert tokenizer("Hello")["input_ids"][0] == bos
    assert prompt_ids(tokenizer, "Hello").count(bos) == 1
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, "Hello").count(bos) == 1


def test_a_text_model_continues_and_does_not_start_after_the_end():
    tokenizer = make_tokenizer(None)
    plain = tokenizer("Hello there")["input_ids"]
    assert prompt_ids(tokenizer, "Hello there") == plain
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, eos)]
    )
    assert tokenizer("Hello there")["input_ids"] == [*plain, eos]
    assert prompt_ids(tokenizer, "Hello there") == plain
    assert stop_token_ids(tokenizer) == [eos]


def test_an_answer_ends_at_eos_where_the_template_writes_it():
    tokenizer = make_tokenizer(MISTRAL)
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_refused_or_empty_prompt_is_the_users_error():
    tokenizer = make_tokenizer("{{ raise_exception('only on Sundays') }}")
    with pytest.raises(UserError, match="only on Sundays"):
        prompt_ids(tokenizer, "Hello")
    with pytest.raises(UserError, match="empty"):
        prompt_ids(make_tokenizer(None), "")
