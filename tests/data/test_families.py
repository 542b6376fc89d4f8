"""Token-exact labels for the chat templates in use today: several turns, system prompts, thinking, tools.

In the expected renderings, what stands between ⟦ and ⟧ is trained.
"""

from __future__ import annotations

import json
import re

import pytest

from finetune.data.chat_template import chat_format
from finetune.data.formats import SourceRow
from finetune.data.messages import as_messages, as_tools
from finetune.data.tokenization import Dropped, encode_chat
from tests.support import chat_templates as published
from tests.support.chat_families import ADD, CALL, FAMILIES, HARMONY_HEAD, SYSTEM, TALK, TOOL_TALK, TOOLS, Family
from tests.support.data import make_tokenizer


def tokenizer_of(family: Family):
    return make_tokenizer(
        family.template,
        family.bos,
        family.eos,
        family.eos,
        special=family.special.split(),
        added=family.added,
        rstrip=family.rstrip,
    )


def encode(tokenizer, messages, tools=None, loss_on="assistant"):
    row = SourceRow("rows:1", tuple(as_messages("rows:1", "messages", messages)), tools=as_tools("rows:1", tools))
    (encoded,) = encode_chat(chat_format(tokenizer), [row], loss_on, 4096)
    return encoded


def check(tokenizer, encoded, expected: str) -> None:
    """The tokens are those of `expected` without its brackets, and trained are those between the brackets."""
    assert not isinstance(encoded, Dropped), encoded.reason
    marks = [match.start() - n for n, match in enumerate(re.finditer("[⟦⟧]", expected))]
    text = re.sub("[⟦⟧]", "", expected)
    assert tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False) == tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
    )
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.input_ids.tolist() == tokens["input_ids"]
    inside = [
        any(a <= start and end <= b for a, b in zip(marks[::2], marks[1::2], strict=True))
        for start, end in tokens["offset_mapping"]
    ]
    assert encoded.trained.tolist() == inside
    assert encoded.turns == encoded.ends == len(marks) // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_several_turns(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    check(tokenizer, encode(tokenizer, TALK), family.talk)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_last_answer(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    check(
        tokenizer,
        encode(tokenizer, TALK, loss_on="completion"),
        re.sub("⟦(.*?)⟧", r"\1", family.talk, count=1, flags=re.S),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    encoded = encode(tokenizer, [SYSTEM, *TALK])
    if family.system is None:
        assert encoded.reason == "the chat template refuses it: System role not supported"
    else:
        check(tokenizer, encoded, family.system)


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_and_their_calls(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    encoded = encode(tokenizer, TOOL_TALK, TOOLS)
    if family.tools is None:
        assert encoded.reason.startswith("the chat template has no place for tool")
    else:
        check(tokenizer, encoded, family.tools)


def test_deepseek_calls_with_arguments_as_text_and_no_words():
    family = FAMILIES["deepseek-v3"]
    tokenizer = tokenizer_of(family)
    expected = (
        "<｜begin▁of▁sentence｜><｜User｜>Two plus"
        " two?<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
        '<｜tool▁sep｜>add\n```json\n{"a": 2, "how":'
        ' "fast"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦It is four.<｜end▁of▁sentence｜>⟧"
    )
    check(tokenizer, encode(tokenizer, TOOL_TALK), expected)


def test_granite_shows_tools_to_plain_answers():
    family = FAMILIES["granite-3"]
    tokenizer = tokenizer_of(family)
    wide = json.dumps([json.loads(ADD)], indent=4)
    tools = f"<|start_of_role|>tools<|end_of_role|>{wide}<|end_of_text|>\n"
    expected = family.talk.replace("<|end_of_text|>\n", f"<|end_of_text|>\n{tools}", 1)
    check(tokenizer, encode(tokenizer, TALK, TOOLS), expected)


def test_thinking_is_trained_where_the_template_shows_it():
    thought = {"role": "assistant", "content": "It is four.", "reasoning_content": "Two and two."}
    qwen = tokenizer_of(FAMILIES["qwen3"])
    head = "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n"
    shown = "⟦<think>\nTwo and two.\n</think>\n\nIt is four.<|im_end|>⟧\n"
    check(qwen, encode(qwen, [TOOL_TALK[0], thought]), head + shown)
    check(
        qwen,
        encode(qwen, [TOOL_TALK[0], thought, TOOL_TALK[0], thought]),
        f"{head}⟦It is four.<|im_end|>⟧\n{head}{shown}",
    )
    in_content = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is four."}
    check(qwen, encode(qwen, [TOOL_TALK[0], in_content]), head + shown)
    harmony = tokenizer_of(FAMILIES["gpt-oss"])
    answer = {"role": "assistant", "content": "It is four.", "thinking": "Two and two."}
    check(
        harmony,
        encode(harmony, [TOOL_TALK[0], answer]),
        f"{HARMONY_HEAD}<|start|>user<|message|>Two plus two?<|end|><|start|>assistant⟦<|channel|>analysis<|message|>"
        "Two and two.<|end|><|start|>assistant<|channel|>final<|message|>It is four.<|return|>⟧",
    )
    chatml = tokenizer_of(FAMILIES["chatml"])
    assert "no place for `thinking`" in encode(chatml, [TOOL_TALK[0], answer]).reason


def test_calls_with_words_and_several_calls():
    qwen = tokenizer_of(FAMILIES["qwen3"])
    other = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    message = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, other]}
    expected = (
        "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nLet me"
        ' see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "how": "fast"}}\n</tool_call>\n<tool_call>\n{"name":'
        ' "stop", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
    )
    check(qwen, encode(qwen, [TOOL_TALK[0], message]), expected)


def test_sharegpt_function_calls_are_calls():
    qwen = tokenizer_of(FAMILIES["qwen2.5"])
    rows = [
        {"from": "human", "value": "Two plus two?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is four."},
    ]
    check(qwen, encode(qwen, rows, json.dumps(TOOLS)), FAMILIES["qwen2.5"].tools)


def test_calls_written_as_python_are_refused():
    template = published.CHATML.replace(
        "+ message['content'] +", "+ (message.tool_calls | string if message.tool_calls else message['content']) +"
    )
    encoded = encode(make_tokenizer(template, eos="<|im_end|>"), TOOL_TALK)
    assert isinstance(encoded, Dropped) and "Python, not as JSON" in encoded.reason
