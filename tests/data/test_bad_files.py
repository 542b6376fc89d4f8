"""Malformed files: one message with file and line, and what is allowed."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.prepare import prepare
from finetune.errors import UserError
from tests.support.data import chat_row, make_tokenizer, recipe_of

GOOD = json.dumps(chat_row("Hello", "Fine"))


def chat(*messages) -> str:
    return json.dumps({"messages": list(messages)})


def parquet(**columns: list) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def line(**record) -> str:
    return json.dumps(record)


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}
TURNS = line(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": None}])
FUNCTION = line(conversations=[{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}])
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
SYSTEM_ONLY = chat({"role": "system", "content": "x"})

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
    "tool calls": (
        "a.jsonl",
        chat({"role": "assistant", "content": "", "tool_calls": [1]}),
        r"must hold calls with `name` and `arguments`, found a num",
    ),
    "half a character": (
        "a.jsonl",
        chat({"role": "user", "content": "\ud800"}),
        r"message 1 \(user\): `content` holds half",
    ),
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
    "object over lines": (
        "a.json",
        '{\n "messages": []\n}',
        r"a.json:1: not a JSON object on one line: .*one list of obj",
    ),
    "utf-16": ("a.jsonl", f"{GOOD}\n".encode("utf-16"), r"a.jsonl:1: byte 0 \(0xff\) is not UTF-8.*iconv -f utf-16"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(f"{GOOD}\n".encode() * 99)[:-30],
        r"a.jsonl.gz.*gzip file is damaged or cut",
    ),
    "not gzip": ("a.jsonl.gz", GOOD, r"a.jsonl.gz: the gzip file is damaged or cut short"),
    "bad line in gzip": ("a.jsonl.gz", gzip.compress(f"{GOOD}\noops".encode()), r"a.jsonl.gz:2: not a JSON object"),
    "not parquet": ("a.parquet", GOOD, r"a.parquet: not a readable parquet file"),
    "cut parquet": ("a.parquet", parquet(text=["a"] * 9)[:-20], r"a.parquet: not a readable parquet file"),
    "null in parquet": (
        "a.parquet",
        parquet(text=["a", None]),
        r"a.parquet row 2: `text` must be a string, found null",
    ),
    "empty parquet": ("a.parquet", parquet(text=pyarrow.array([], pyarrow.string())), r"a.parquet holds no rows"),
    "csv without rows": ("a.csv", "text\n", r"a.csv holds no rows"),
    "csv with a long row": ("a.csv", "text\na\nb,c\n", r"a.csv:3: the row has 2 fields, the header has 1"),
    "csv quote left open": ("a.csv", 'text\n"a\nb\nc\n', r"a.csv:2: not valid CSV: unexpected end of data"),
    "csv header twice": ("a.csv", "text,text\na,b\n", r"a.csv:1: the header has `text` twice"),
    "csv header unnamed": ("a.csv", ",text\n0,b\n", r"a.csv:1: the header has a column without a name"),
    "csv latin-1": ("a.csv", "text\na\né\n".encode("latin-1"), r"a.csv:3: byte 0 \(0xe9\) is not UTF-8"),
    "csv of no format": ("a.csv", "question,answer\na,b\n", r"columns: \{prompt: question, completion: answer\}"),
    "csv messages cut": ("a.csv", 'messages\n"[{""role"""\n', r"a.csv:2: `messages` is not valid JSON"),
    "sharegpt null": ("a.jsonl", TURNS, r"a.jsonl:1: message 2 \(gpt\): `value` must be a string, found null"),
    "call not json": ("a.jsonl", FUNCTION, r"a.jsonl:1: message 2 \(function_call\): `value` is not valid JSON"),
    "arguments not json": ("a.jsonl", chat(CALL), r"message 1: `tool_calls`: `arguments` of f is not valid JSON"),
    "user calls a tool": ("a.jsonl", chat({**CALL, "role": "user"}), r"only an assistant message calls tools"),
    "image": ("a.jsonl", chat(IMAGE), r"has a part of type 'image_url'. Only text"),
    "tools not json": (
        "a.jsonl",
        line(messages=json.loads(GOOD)["messages"], tools="[x"),
        r"`tools` is not valid JSON",
    ),
    "tools without name": (
        "a.jsonl",
        line(messages=json.loads(GOOD)["messages"], tools=[{"a": 1}]),
        r"tools with a `name`",
    ),
    "alpaca null": ("a.jsonl", line(instruction="a", output=None), r"a.jsonl:1: `output` must be a string, found null"),
    "alpaca number": ("a.jsonl", line(instruction=7, output="a"), r"`instruction` must be a string, found a number"),
    "alpaca history": ("a.jsonl", line(instruction="a", output="b", history=["c"]), r"`history` turn 1 must be a list"),
    "system a list": (
        "a.jsonl",
        line(instruction="a", output="b", system=[]),
        r"`system` must be a string, found a list",
    ),
    "no completion": (
        "a.jsonl",
        f"{line(prompt='a', completion='b')}\n{line(prompt='a')}",
        r"a.jsonl:2: .*`completion` is m",
    ),
    "mixed schemas": (
        "a.jsonl",
        f"{line(instruction='a', output='b')}\n{line(text='c')}",
        r"a.jsonl:2: .*`instruction` is m",
    ),
    "chosen alone": ("a.jsonl", line(chosen="a", rejected="b"), r"`chosen` is an answer without a question"),
    "nothing to train": (
        "a.jsonl",
        f"{SYSTEM_ONLY}\n" * 3,
        r"data.train: 3 of 3 rows .*it has no assistant turn.*a.jsonl:1",
    ),
    "numbers": ("a.jsonl", "1\n2\n", r"a.jsonl:1: a row is a JSON object with columns, found a number"),
    "nested deep": ("a.jsonl", "[" * 99999, r"a.jsonl:1: not a JSON object on one line"),
    "suffix": ("a.xlsx", "text\nhello\n", r"recipe.yaml:4: data.train: a.xlsx ends in '.xlsx'. Local files may be"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_with_file_and_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file, content, expected = CASES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    tokenizer = TOKENIZER
    with pytest.raises(UserError, match=expected) as caught:
        prepare(recipe_of(tmp_path, tmp_path / file), tokenizer, print)
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
    prepared = prepare(recipe_of(tmp_path, tmp_path / "a.json"), TOKENIZER, print)
    assert len(prepared.train) == 2


def test_a_folder_and_a_split_of_a_file_are_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train: .*rows is a folder without data files"):
        prepare(recipe_of(tmp_path, tmp_path / "rows"), TOKENIZER, print)
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="split is 'test', but a.jsonl is one file"):
        prepare(recipe_of(tmp_path, tmp_path / "a.jsonl", "data.train[0].split=test"), TOKENIZER, print)


def test_an_unknown_hub_data_set_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train: 'no-such/data-set' \(split 'train'\) is no local"):
        prepare(recipe_of(tmp_path, "no-such/data-set"), TOKENIZER, print)
