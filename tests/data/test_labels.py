"""Which tokens are trained: exact for several template families, by position, whatever pad and eos are."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.chat_template import chat_format
from finetune.data.formats import SourceRow
from finetune.data.token_cache import TokenRow
from finetune.data.tokenization import Dropped, encode_chat
from tests.support.data import (
    CHATML,
    CHATML_GENERATION,
    GEMMA,
    LLAMA3,
    MISTRAL,
    OPEN_ENDED,
    PLAIN,
    QWEN3,
    TWO_ENDS,
    ZEPHYR,
    chat_row,
    make_tokenizer,
    trained_texts,
)


def encode(tokenizer, *rows, loss_on="assistant", max_length=4096):
    source_rows = [SourceRow(f"rows:{i}", messages=tuple(row["messages"])) for i, row in enumerate(rows, 1)]
    return list(encode_chat(chat_format(tokenizer), source_rows, loss_on, max_length))


def as_row(encoded) -> TokenRow:
    return TokenRow(encoded.input_ids, np.where(encoded.trained, encoded.input_ids, -100))


def trained(tokenizer, row, **options) -> list[str]:
    (encoded,) = encode(tokenizer, row, **options)
    return trained_texts(tokenizer, as_row(encoded))


FAMILIES = {
    "chatml": (CHATML, None, "<|im_end|>", "{}<|im_end|>"),
    "chatml with generation marks": (CHATML_GENERATION, None, "<|im_end|>", "{}<|im_end|>"),
    "chatml, eos is another token": (CHATML, None, "</s>", "{}<|im_end|>"),
    "llama-3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "{}<|eot_id|>"),
    "zephyr": (ZEPHYR, "<s>", "</s>", "{}</s>"),
    "mistral": (MISTRAL, "<s>", "</s>", " {}</s>"),
    "command-r7b": (TWO_ENDS, None, "</s>", "{}<|end|></s>"),
    "gemma": (GEMMA, "<bos>", "</s>", "{}<end_of_turn>"),
}


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_assistant_turn_with_its_end_and_nothing_else_is_trained(family, pad_is_eos):
    template, bos, eos, turn = FAMILIES[family]
    tokenizer = make_tokenizer(template, bos=bos, eos=eos, pad=eos if pad_is_eos else "<pad>")
    system = None if family == "gemma" else "You are kind."
    row = chat_row("Hello there!", "How are you?", "Fine. What is 2+2?", "It is four.\n\nBye.", system=system)
    assert trained(tokenizer, row) == [turn.format("How are you?"), turn.format("It is four.\n\nBye.")]
    assert trained(tokenizer, row, loss_on="completion") == [turn.format("It is four.\n\nBye.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_apply_chat_template_without_a_double_bos(family):
    template, bos, eos, _ = FAMILIES[family]
    tokenizer = make_tokenizer(template, bos=bos, eos=eos, add_bos=bos is not None)
    row = chat_row("Hello there!", "How are you?")
    (encoded,) = encode(tokenizer, row)
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert bos is None or encoded.input_ids.tolist().count(tokenizer.bos_token_id) <= 1
    (whole,) = encode(tokenizer, row, loss_on="all")
    assert whole.trained.tolist() == [False] + [True] * (len(whole.input_ids) - 1)


def test_a_user_who_repeats_the_answer_is_not_trained():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    row = chat_row("four", "four", "<|im_start|>assistant\nfour<|im_end|>", "four", "four")
    (encoded,) = encode(tokenizer, row)
    assert trained_texts(tokenizer, as_row(encoded)) == ["four<|im_end|>", "four<|im_end|>"]
    answers = np.flatnonzero(np.diff(np.concatenate([[0], encoded.trained.astype(int)])) == 1)
    text_before = tokenizer.decode(encoded.input_ids[: answers[1]], clean_up_tokenization_spaces=False)
    assert text_before.count("four") == 3 and text_before.endswith("<|im_start|>assistant\n")


def test_white_space_at_the_edges_is_trained_only_where_the_template_keeps_it():
    row = chat_row(" Hello \n", "\n How are you?  \n", "Fine", " Bye ")
    keeps, strips = make_tokenizer(CHATML), make_tokenizer(LLAMA3, bos="<s>")
    assert trained(keeps, row) == ["\n How are you?  \n<|im_end|>", " Bye <|im_end|>"]
    assert trained(strips, row) == ["How are you?<|eot_id|>", "Bye<|eot_id|>"]


def test_a_template_that_strips_some_turns_only():
    template = CHATML.replace("m['content']", "(m['content'].strip() if loop.last else m['content'])")
    row = chat_row("Hello", "\nHow are you?", "Fine", "\nBye ")
    assert trained(make_tokenizer(template), row) == ["\nHow are you?<|im_end|>", "Bye<|im_end|>"]


def test_qwen3_style_thinking_is_trained_where_the_template_shows_it():
    tokenizer = make_tokenizer(QWEN3, eos="<|im_end|>")
    thinking = "<think>\nTwo and two.\n</think>\n\nIt is four."
    assert trained(tokenizer, chat_row("2+2?", thinking)) == [thinking + "<|im_end|>"]
    # the opening tag and the layout are the template's, the thought is the row's
    squeezed = trained(tokenizer, chat_row("2+2?", "<think>Two and two.</think>It is four."))
    assert squeezed == [thinking + "<|im_end|>"]
    row = chat_row("2+2?", thinking, "And?", "Bye.")
    assert trained(tokenizer, row) == ["It is four.<|im_end|>", "Bye.<|im_end|>"]


def test_answers_full_of_tags_are_trained_whole():
    row = chat_row("<b>Hi</b>", "<b>bold</b> text <i>x</i>", "<p>", "<hr>")
    assert trained(make_tokenizer(CHATML), row) == ["<b>bold</b> text <i>x</i><|im_end|>", "<hr><|im_end|>"]


def test_a_turn_ended_by_the_next_header_learns_that_and_the_last_one_gets_eos():
    tokenizer = make_tokenizer(OPEN_ENDED)
    (encoded,) = encode(tokenizer, chat_row("Hello", "Fine.", "Bye", "Bye."))
    assert trained_texts(tokenizer, as_row(encoded)) == ["Fine.<|user|>", "Bye.</s>"]
    assert (encoded.turns, encoded.ends) == (2, 2)
    (plain,) = encode(make_tokenizer(PLAIN), chat_row("Hello", "Fine", "Bye", "Bye"))
    assert (plain.turns, plain.ends) == (2, 1)


def test_a_special_token_inside_the_content_does_not_end_the_turn():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    assert trained(tokenizer, chat_row("x", "one</s>two<|end|>three")) == ["one</s>two<|end|>three<|im_end|>"]


def test_an_empty_answer_learns_its_end():
    assert trained(make_tokenizer(CHATML), chat_row("Hello", "")) == ["<|im_end|>"]


def test_a_header_token_that_swallows_white_space_stays_untrained():
    tokenizer = make_tokenizer(ZEPHYR, rstrip=("<|assistant|>",))
    assert trained(tokenizer, chat_row("Hello", " Fine.")) == ["Fine.</s>"]


def test_truncation_keeps_the_left_and_counts_lost_ends():
    tokenizer = make_tokenizer(CHATML)
    row = chat_row("Hello", "How are you today? I am fine, thank you.")
    (whole,) = encode(tokenizer, row)
    (cut,) = encode(tokenizer, row, max_length=len(whole.input_ids) - 3)
    assert cut.truncated and (cut.turns, cut.ends) == (1, 0) and (whole.turns, whole.ends) == (1, 1)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:-3]
    assert cut.trained.tolist() == whole.trained.tolist()[:-3]
    (gone,) = encode(tokenizer, row, max_length=4)
    assert gone == Dropped("rows:1", "truncation leaves no trained token")


def test_what_cannot_be_a_row_says_why():
    mistral = make_tokenizer(MISTRAL, bos="<s>")
    refused, silent, good = encode(
        mistral,
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        chat_row("a", "b"),
    )
    assert "roles must alternate" in refused.reason and silent.reason == "it has no assistant turn"
    assert good.trained.any()
    shouting = make_tokenizer(CHATML.replace("m['content']", "(m['content'] | length | string)"))
    assert "cannot be located" in encode(shouting, chat_row("a", "b"))[0].reason
    twice = make_tokenizer(CHATML.replace("m['content']", "m['content'] + m['content']"))
    assert "repeats" in encode(twice, chat_row("a", "b"))[0].reason


def test_private_use_characters_in_a_row_are_survived():
    text = "icon \U000f0001 there"
    assert trained(make_tokenizer(CHATML), chat_row(text, text)) == [text + "<|im_end|>"]


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day():
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(template)
    (encoded,) = encode(tokenizer, chat_row("Hello", "Fine"))
    assert tokenizer.decode(encoded.input_ids).startswith("2024-07-26<|im_start|>")
