"""Malformed files: one message with file and line, and what is allowed."""

from __future__ import annotations

import json

import pytest
from data_support import chat_row, load_recipe, make_tokenizer

from finetune import data
from finetune.errors import UserError

GOOD = json.dumps(chat_row("Hello", "Fine"))


def chat(*messages) -> str:
    return json.dumps({"messages": list(messages)})


CASES = {
    "bad json": ("a.jsonl", f"{GOOD}\n{{oops}}\n", r"a.jsonl:2: not a JSON object on one line: .*column 2"),
    "cut line": ("a.jsonl", f"{GOOD}\n\n{GOOD[:20]}", r"a.jsonl:3: not a JSON object"),
    "no object": ("a.jsonl", f"{GOOD}\n[1]\n", r"a.jsonl:2: a row is a JSON object with columns, found a list"),
    "list in jsonl": ("a.jsonl", f"[\n{GOOD}\n]", r"a.jsonl:1: .* name it .json"),
    "unknown columns": ("a.jsonl", '{"prompt": "a", "answer": "b"}', r"a.jsonl:1: .* `prompt`, `answer`.*`messages`"),
    "column vanishes": ("a.jsonl", f'{GOOD}\n{{"text": "a"}}', r"a.jsonl:2: column `messages` is missing.*`text`"),
    "messages is text": ("a.jsonl", '{"messages": "hi"}', r"a.jsonl:1: `messages` must be a list .* found a string"),
    "messages is empty": ("a.jsonl", '{"messages": []}', r"a.jsonl:1: .* found an empty list"),
    "message is text": ("a.jsonl", chat("hi"), r"a.jsonl:1: message 1 must be an object .* found a string"),
    "speaker unknown": ("a.jsonl", chat({"from": "Bob", "value": "x"}), r"message 1 is from 'Bob'. Allowed: human"),
    "null content": ("a.jsonl", chat({"role": "user", "content": None}), r"\(user\): `content` must be .* found null"),
    "unknown role": ("a.jsonl", chat({"role": "gpt", "content": "x"}), r"has role 'gpt'. Allowed: .*assistant"),
    "role is a list": ("a.jsonl", chat({"role": ["user"], "content": "x"}), r"message 1 has role \['user'\]"),
    "tool calls": ("a.jsonl", chat({"role": "assistant", "content": "", "tool_calls": [1]}), r"must hold calls with `name` and `arguments`, found a num"),
    "half a character": ("a.jsonl", chat({"role": "user", "content": "\ud800"}), r"message 1 \(user\): `content` holds half"),
    "null text": ("a.jsonl", '{"text": "a"}\n{"text": null}', r"a.jsonl:2: `text` must be a string, found null"),
    "number as text": ("a.jsonl", '{"text": "a"}\n{"text": 3}', r"a.jsonl:2: `text` must be a string, found a number"),
    "latin-1": ("a.jsonl", f"{GOOD}\n".encode() + '{"text": "é"}'.encode("latin-1"), r"a.jsonl:2: byte 10 .* UTF-8"),
    "latin-1 json": ("a.json", '[\n{"text": "é"}]'.encode("latin-1"), r"a.json:2: byte \d+ .* not UTF-8"),
    "latin-1 txt": ("a.txt", "é".encode("latin-1"), r"a.txt: byte 0 .* not UTF-8"),
    "empty file": ("a.jsonl", "", r"recipe.yaml:4: data.train: .*a.jsonl holds no rows"),
    "empty list": ("a.json", " [ ] ", r"recipe.yaml:4: data.train: .*a.json holds no rows"),
    "blank lines": ("a.jsonl", "\n\n", r"holds no rows"),
    "unclosed list": ("a.json", f"[{GOOD},\n{GOOD}", r"a.json:2: .* expected ',' or '\]' after a row, found the end"),
    "comma at the end": ("a.json", f"[{GOOD},\n]", r"a.json:2: not valid JSON"),
    "after the list": ("a.json", f"[{GOOD}]\n[]", r"a.json:1: text after the end"),
    "bad row in a list": ("a.json", f"[\n{GOOD},\n\n{{'a': 1}}]", r"a.json:4: not valid JSON"),
    "columns in a list": ("a.json", f'[\n{GOOD},\n{{"text": "a"}}]', r"a.json:3: column `messages` is missing"),
    "suffix": ("a.xlsx", "text\nhello\n", r"recipe.yaml:4: data.train: a.xlsx ends in '.xlsx'. Local files may be"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_with_file_and_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file, content, expected = CASES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    tokenizer = TOKENIZER
    overrides = ["data.loss_on=all"] if "text" in name or file.endswith("txt") or "latin" in name else []
    with pytest.raises(UserError, match=expected) as caught:
        data.prepare(load_recipe(tmp_path, tmp_path / file, *overrides), tokenizer, print)
    assert len(caught.value.messages) == 1 and caught.value.exit_code == 2


TOKENIZER = make_tokenizer()


@pytest.mark.parametrize(
    "content",
    [
        f"\ufeff{GOOD}\r\n{GOOD}\r\n",
        f"\n{GOOD}\n\n{GOOD}",
        json.dumps(json.loads(f"[{GOOD}, {GOOD}]"), indent=2),
        f"\ufeff\n[{GOOD},{GOOD}]\n",
    ],
    ids=["bom and crlf", "blank lines", "indented list", "bom and list"],
)
def test_harmless_oddities_are_read(tmp_path, monkeypatch, content):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.json").write_bytes(content.encode())
    prepared = data.prepare(load_recipe(tmp_path, tmp_path / "a.json"), TOKENIZER, print)
    assert len(prepared.train) == 2


def test_a_folder_and_a_split_of_a_file_are_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train: .*rows is a folder without data files"):
        data.prepare(load_recipe(tmp_path, tmp_path / "rows"), TOKENIZER, print)
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="split is 'test', but a.jsonl is one file"):
        data.prepare(load_recipe(tmp_path, tmp_path / "a.jsonl", "data.train[0].split=test"), TOKENIZER, print)


def test_an_unknown_hub_data_set_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train: 'no-such/data-set' \(split 'train'\) is no local"):
        data.prepare(load_recipe(tmp_path, "no-such/data-set"), TOKENIZER, print)
