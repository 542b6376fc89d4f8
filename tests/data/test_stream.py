"""data.streaming: the same rows in the same order on every rank and in every run, refused early where it is wrong."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest

from finetune.batching.layout import split_into_micro_batches
from finetune.data.stream import open_stream
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.training import job, step
from tests.data.test_bad_files import CASES as BAD_FILES
from tests.support.data import CHATML, chat_row, make_tokenizer, recipe_of, trained_texts, write_jsonl
from tests.support.tiny_models import small_recipe

STREAM = ("data.streaming=true", "training.max_steps=4")
TOKENIZER = make_tokenizer(CHATML, eos="<|im_end|>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def stream(tmp_path, train, *overrides, extra=""):
    return open_stream(recipe_of(tmp_path, train, *STREAM, *overrides, extra=extra), TOKENIZER, lambda line: None)


def texts(rows, count: int, first: int = 0) -> list[str]:
    return [TOKENIZER.decode(rows.row(i).input_ids) for i in range(first, first + count)]


def users(rows, count: int) -> list[str]:
    return [text.split("\n")[1].removesuffix("<|im_end|>") for text in texts(rows, count)]


def test_every_pass_holds_every_row_once_in_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.stream.BLOCK_ROWS", 16)
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row(f"a{i}", "Fine") for i in range(40)])
    rows = stream(tmp_path, file).train
    first, second = users(rows, 80)[:40], users(rows, 80)[40:]
    assert sorted(first) == sorted(second) == sorted(f"a{i}" for i in range(40)) and first != second
    assert {int(name[1:]) for name in first[:16]} == set(range(16)) and first[:16] != [f"a{i}" for i in range(16)]
    assert users(stream(tmp_path, file).train, 80) == first + second
    assert users(stream(tmp_path, file, "training.seed=7").train, 80) != first + second
    assert trained_texts(TOKENIZER, rows.row(3)) == ["Fine<|im_end|>"]


def test_ranks_that_take_their_slices_alone_take_the_rows_of_one(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row(f"a{i}", "Fine") for i in range(40)])
    alone = stream(tmp_path, file).train
    for ranks in (2, 3):
        of_rank = [stream(tmp_path, file).train for _ in range(ranks)]
        for first in (0, 12, 24):
            shares = split_into_micro_batches(range(first, first + 12), ranks, 2)
            for rank, share in enumerate(shares):
                for index in (index for micro_batch in share for index in micro_batch):
                    assert of_rank[rank].row(index).input_ids.tolist() == alone.row(index).input_ids.tolist()


def test_earlier_rows_can_be_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.stream._KEPT_ROWS", 4)
    rows = stream(tmp_path, write_jsonl(tmp_path / "a.jsonl", [chat_row(f"a{i}", "Fine") for i in range(40)])).train
    forward = texts(rows, 20)
    assert texts(rows, 20) == forward and texts(rows, 3, 17) == forward[17:]


def test_sources_are_mixed_by_their_weights(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [chat_row(f"{name}{i}", "Fine") for i in range(n)])
        for name, n in (("a", 7), ("b", 90))
    ]
    names = users(stream(tmp_path, files, "data.train[0].weight=3").train, 80)
    assert Counter(name[0] for name in names) == {"a": 60, "b": 20}
    assert all(Counter(name[0] for name in names[i : i + 4]) == {"a": 3, "b": 1} for i in range(0, 80, 4))


def test_text_is_cut_into_blocks_and_mixed_with_chat(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "Hello there! " * 5}] * 20)
    chat = write_jsonl(tmp_path / "b.jsonl", [chat_row("a", "Fine")] * 3)
    rows = stream(tmp_path, [text, chat], "data.max_length=32").train
    found = [rows.row(i) for i in range(10)]
    assert [len(row.input_ids) for row in found[::2]] == [32] * 5
    assert all((row.labels[1:] == row.input_ids[1:]).all() for row in found[::2])
    assert texts(rows, 1, 1)[0].endswith("Fine<|im_end|>\n")


def test_a_stream_trains_and_evaluates_like_rows(tmp_path):
    path = small_recipe(tmp_path)
    held_out = write_jsonl(tmp_path / "held.jsonl", [chat_row("a", "b")] * 3)
    text = path.read_text().replace("  eval_fraction: 0.2\n", f"  eval: [{{path: {held_out}}}]\n  streaming: true\n")
    path.write_text(text.replace("num_train_epochs: 1", "max_steps: 9"))
    plan = job.prepare(load_recipe(path), one_process(), print)
    running = job.assemble(plan, print)
    before = step.evaluate(running)
    results = list(step.train(running))
    assert [result.step for result in results] == list(range(1, 10)) and all(result.rows == 8 for result in results)
    assert step.evaluate(running) < before and results[-1].epoch == 0
    running.engine.close()


def test_what_does_not_go_with_streaming_is_refused_at_once(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")])
    with pytest.raises(UserError) as caught:
        recipe_of(tmp_path, file, "data.streaming=true", "data.eval_fraction=0.1", "data.max_rows=3")
    said = sorted(caught.value.messages)
    words = ("data.eval_fraction is 0.1", "data.max_rows is 3", "set training.max_steps")
    assert [word in message for word, message in zip(words, said, strict=True)] == [True] * 3, said


@pytest.mark.parametrize("name", BAD_FILES)
def test_malformed_files_are_met_before_the_first_step(tmp_path, name):
    file, content, expected = BAD_FILES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=expected) as caught:
        stream(tmp_path, tmp_path / file)
    assert len(caught.value.messages) == 1


def test_a_bad_row_far_behind_is_met_before_the_first_step(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")] * 500)
    file.write_text(file.read_text() + json.dumps({"messages": "x"}) + "\n")
    with pytest.raises(UserError, match="a.jsonl:501: `messages` must be a list"):
        stream(tmp_path, file)


def test_rows_that_cannot_be_trained_on_end_the_run_above_the_share(tmp_path):
    silent = {"messages": [{"role": "user", "content": "c"}]}
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row(f"a{i}", "b") for i in range(300)] + [silent] * 300)
    rows = stream(tmp_path, file, "data.max_dropped_fraction=0.2").train
    with pytest.raises(
        UserError, match=r"rows of a.jsonl cannot be trained on, at most 20% .*it has no assistant turn"
    ):
        texts(rows, 500)
    rows = stream(tmp_path, file, "data.max_dropped_fraction=0.9").train
    assert len(set(islice(users(rows, 300), 300))) == 300
