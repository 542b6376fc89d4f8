"""Every row format and file kind that is recognised, by name and by itself; columns, system prompts, weights."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.prepare import prepare as prepare_data
from finetune.data.prepare import weighted_rows
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.training import job, step
from tests.support.chat_families import FAMILIES
from tests.support.data import CHATML, chat_row, make_tokenizer, recipe_of, trained_texts, write_jsonl
from tests.support.tiny_models import tiny_model

TOKENIZER = make_tokenizer(CHATML, eos="<|im_end|>")
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def prepare(tmp_path, train, *overrides, tokenizer=TOKENIZER, lines=None, extra=""):
    loaded = recipe_of(tmp_path, train, *overrides, extra=extra)
    return prepare_data(loaded, tokenizer, (lines if lines is not None else []).append)


def texts(rows, tokenizer=TOKENIZER) -> list[str]:
    return [tokenizer.decode(rows.row(i).input_ids, clean_up_tokenization_spaces=False) for i in range(len(rows))]


PAIR = ASKED.format("Hello", "Fine")
SYSTEM_PAIR = "<|im_start|>system\nBe kind.<|im_end|>\n" + PAIR
TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Fine"}]
MESSAGES = chat_row("Hello", "Fine")["messages"]
RECOGNISED = {
    "messages": ({"messages": MESSAGES}, PAIR),
    "messages with a system column": ({"messages": MESSAGES, "system": "Be kind."}, SYSTEM_PAIR),
    "messages with parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, MESSAGES[1]]},
        PAIR,
    ),
    "sharegpt": ({"conversations": TURNS, "id": "x"}, PAIR),
    "sharegpt with system": ({"conversations": TURNS, "system": "Be kind.", "tools": "[]"}, SYSTEM_PAIR),
    "sharegpt keys in messages": ({"messages": TURNS}, PAIR),
    "alpaca": ({"instruction": "Hello", "input": "", "output": "Fine"}, PAIR),
    "alpaca with input": ({"instruction": "He", "input": "llo", "output": "Fine"}, ASKED.format("He\nllo", "Fine")),
    "alpaca with system, null input": (
        {"instruction": "Hello", "input": None, "output": "Fine", "system": "Be kind."},
        SYSTEM_PAIR,
    ),
    "alpaca with history": (
        {"instruction": "b", "output": "c", "history": [["Hello", "Fine"]]},
        PAIR + ASKED.format("b", "c"),
    ),
    "dolly": ({"instruction": "He", "context": "llo", "response": "Fine"}, ASKED.format("He\nllo", "Fine")),
    "prompt and completion": ({"prompt": "Hello", "completion": "Fine"}, PAIR),
    "prompt and response": ({"prompt": "Hello", "response": "Fine"}, PAIR),
    "prompt and completion as messages": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, PAIR),
    "preference": ({"prompt": "Hello", "chosen": "Fine", "rejected": "No"}, PAIR),
    "preference over conversations": ({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}, PAIR),
    "preference with whole dialogues": ({"chosen": MESSAGES, "rejected": MESSAGES}, PAIR),
    "preference with a repeated prompt": ({"prompt": "Hello", "chosen": MESSAGES, "rejected": MESSAGES}, PAIR),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_formats_are_recognised_from_their_columns(tmp_path, name):
    record, expected = RECOGNISED[name]
    prepared = prepare(tmp_path, write_jsonl(tmp_path / "a.jsonl", [record]))
    assert texts(prepared.train) == [expected]
    assert trained_texts(TOKENIZER, prepared.train.row(0))[-1] in ("Fine<|im_end|>", "c<|im_end|>")


def test_a_format_can_be_named_and_columns_mapped(tmp_path):
    record = {"messages": "x", "text": "y", "question": "Hello", "reply": "Fine"}
    file = write_jsonl(tmp_path / "a.jsonl", [record])
    mapped = "data.train[0].columns={prompt: question, completion: reply}"
    assert texts(prepare(tmp_path, file, mapped, "data.train[0].format=prompt_completion").train) == [PAIR]
    with pytest.raises(UserError, match=r"a.jsonl:1: .* format: alpaca needs `instruction` and `output`"):
        prepare(tmp_path, file, "data.train[0].format=alpaca")
    with pytest.raises(UserError, match=r"a.jsonl:1: `columns` maps prompt to `asked`, but the columns are"):
        prepare(tmp_path, file, "data.train[0].columns={prompt: asked}")
    with pytest.raises(
        UserError, match=r"command line: data.train\[0\].columns names 'question', which is none of ours"
    ):
        prepare(tmp_path, file, "data.train[0].columns={question: prompt}")


def test_what_is_not_used_is_said(tmp_path):
    lines = []
    prepare(tmp_path, write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES, "label": False}]), lines=lines)
    assert any("a.jsonl is read as messages (columns not used: label)" in line for line in lines)


def test_a_source_can_bring_a_system_prompt_for_rows_without_one(tmp_path):
    rows = [{"messages": MESSAGES}, {"messages": [{"role": "system", "content": "Own."}, *MESSAGES]}]
    prepared = prepare(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows), "data.train[0].system=Be kind.")
    assert texts(prepared.train) == [SYSTEM_PAIR, SYSTEM_PAIR.replace("Be kind.", "Own.")]


def test_prompt_and_completion_need_no_chat_template(tmp_path):
    tokenizer = make_tokenizer(None, bos="<s>", add_bos=True)
    prepared = prepare(
        tmp_path, write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hello", "completion": " there "}]), tokenizer=tokenizer
    )
    assert texts(prepared.train, tokenizer) == ["<s>Hello there </s>"]
    assert trained_texts(tokenizer, prepared.train.row(0)) == [" there </s>"]


def write_kind(file: Path, rows: list[dict]) -> Path:
    suffix = file.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    if suffix in ("csv", "tsv"):
        plain = file.with_name("plain")
        with plain.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
    else:
        content = (json.dumps(rows, indent=1) if suffix == "json" else "\n".join(map(json.dumps, rows))).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.mark.parametrize("name", "a.jsonl a.json a.csv a.tsv a.parquet a.jsonl.gz a.json.gz a.csv.gz A.JSONL".split())
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = [{"instruction": f'Say\n"{i}", please', "input": "", "output": f"é {i}"} for i in range(5)]
    prepared = prepare(tmp_path, write_kind(tmp_path / name, rows))
    assert texts(prepared.train) == [ASKED.format(row["instruction"], row["output"]) for row in rows]


def test_messages_in_parquet_and_csv(tmp_path):
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES}]
    assert texts(prepare(tmp_path, write_kind(tmp_path / "a.parquet", rows)).train) == [PAIR] * 2
    rows = [{"messages": json.dumps(MESSAGES)}]
    assert texts(prepare(tmp_path, write_kind(tmp_path / "a.csv", rows)).train) == [PAIR]


def test_a_folder_is_its_files_by_name_and_splits_are_kept_apart(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name in ("b", "a"):
        write_jsonl(folder / f"train-{name}.jsonl", [chat_row(name, "Fine")])
    write_jsonl(folder / "test-a.jsonl", [chat_row("test", "Fine")])
    (folder / "README.md").write_text("no rows")
    users = lambda prepared: [text.split("\n")[1] for text in texts(prepared.train)]  # noqa: E731
    assert users(prepare(tmp_path, tmp_path / "set")) == ["a<|im_end|>", "b<|im_end|>"]
    assert users(prepare(tmp_path, tmp_path / "set", "data.train[0].split=test")) == ["test<|im_end|>"]
    with pytest.raises(UserError, match="split is 'validation', but the files in .*set are of test, train"):
        prepare(tmp_path, tmp_path / "set", "data.train[0].split=validation")


def test_weights_repeat_and_halve_sources_by_the_seed_alone(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [chat_row(f"{name}{i}", "Fine") for i in range(10)]) for name in "ab"
    ]

    def counts(*overrides):
        prepared = prepare(tmp_path, files, "data.train[0].weight=2.3", "data.train[1].weight=0.5", *overrides)
        assert prepared.summary["rows"] == len(prepared.train) == 28
        assert prepared.summary["trained_tokens"] == prepared.train.trained.sum()
        rows = [text.split("\n")[1].removesuffix("<|im_end|>") for text in texts(prepared.train)]
        return Counter(rows), prepared.train.fingerprint, prepared.summary["cache"]

    first, fingerprint, cache = counts()
    assert cache == "new" and sorted(first.values()) == [1] * 5 + [2] * 7 + [3] * 3
    assert {name[0] for name, count in first.items() if count == 1} == {"b"}
    assert counts() == (first, fingerprint, "reused")
    other, changed, cache = counts("training.seed=7")
    assert other != first and changed != fingerprint and cache == "reused"
    with pytest.raises(UserError, match="data.eval\\[0\\].weight is 2, but evaluation takes every row once"):
        prepare(tmp_path, files[0], extra=f"  eval:\n    - path: {files[1]}\n      weight: 2\n")


def test_weights_of_one_change_nothing():
    assert weighted_rows([3, 4], [1, 1.0], 0) is None
    assert weighted_rows([3, 1000], [1, 0.0001], 0).tolist()[:3] == [0, 1, 2]
    assert len(weighted_rows([3, 1000], [1, 0.0001], 0)) == 4


def test_the_dropped_share_is_a_setting(tmp_path):
    silent = {"messages": MESSAGES[:1]}
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")] * 5 + [silent] * 5)
    with pytest.raises(UserError, match=r"5 of 10 rows .* 10% may be dropped \(data.max_dropped_fraction\)"):
        prepare(tmp_path, file)
    assert len(prepare(tmp_path, file, "data.max_dropped_fraction=0.5").train) == 5


def test_many_rows_in_processes_are_those_of_one(tmp_path, monkeypatch):
    rows = [chat_row(f"What is {i}?", "It is four. " * (i % 7)) for i in range(3000)]
    chat = write_jsonl(tmp_path / "a.jsonl", rows)
    text = write_jsonl(tmp_path / "b.jsonl", [{"text": f"{i} Hello there! " * (i % 5)} for i in range(3000)])
    found = []
    for cores in (3, 1):
        monkeypatch.setattr("finetune.data.parallel.usable_cores", lambda: cores)  # noqa: B023
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache{cores}"))
        prepared = prepare(
            tmp_path, [chat, text], "data.max_length=64", "data.eval_fraction=0.1", "data.max_dropped_fraction=0.5"
        )
        entry = Path(prepared.summary["cache_folder"])
        found.append(
            [
                np.load(entry / side / f"{name}.npy").tolist()
                for side in ("train", "evaluation")
                for name in ("tokens", "mask", "ends")
            ]
        )
    assert found[0] == found[1]


REAL = {
    "alpaca_en_demo.json": ("alpaca", 999),
    "c4_demo.jsonl": ("text", 300),
    "dpo_en_demo.json": ("preference", 299),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "kto_en_demo.json": ("messages", 300),
}


@pytest.mark.skipif("FINETUNE_REAL_DATA" not in os.environ, reason="FINETUNE_REAL_DATA is not set")
@pytest.mark.parametrize("name", REAL)
def test_the_real_demo_sets_load_without_options_and_train(tmp_path, name):
    source = Path(os.environ["FINETUNE_REAL_DATA"]) / name
    qwen = FAMILIES["qwen2.5"]
    tokenizer = make_tokenizer(
        qwen.template, eos=qwen.eos, pad="<|endoftext|>", special=qwen.special.split(), added=qwen.added
    )
    base = tiny_model(tmp_path / "base")
    tokenizer.save_pretrained(base)
    text = f"model: {{name_or_path: {base}}}\ndata: {{train: [{{path: {source}}}]}}\noutput_dir: {tmp_path / 'run'}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    short = (
        "data.max_length=128",
        "training.max_steps=2",
        "training.global_batch_size=4",
        "training.per_device_train_batch_size=2",
    )
    # with the model's 256 positions most rows of a byte-level vocabulary this small are cut
    plan = job.prepare(
        load_recipe(tmp_path / "recipe.yaml", (*short, "data.max_dropped_fraction=1")), one_process(), print
    )
    running = job.assemble(plan, print)
    results = list(step.train(running))
    assert [result.applied for result in results] == [True, True]
    running.engine.close()
    without_options = prepare_data(recipe_of(tmp_path, source), tokenizer, print)
    assert without_options.summary["source_rows"] == REAL[name][1]
    prepared = prepare_data(recipe_of(tmp_path, source, "data.max_length=100000"), tokenizer, print)
    assert prepared.summary["source_rows"] == REAL[name][1] and not prepared.summary["dropped"]
    assert prepared.summary["sources"][0]["format"] == REAL[name][0]
    assert prepared.summary["ends"] == prepared.summary["turns"]
