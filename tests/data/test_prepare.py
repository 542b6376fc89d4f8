"""Recipes' data sections made into token rows: text blocks, held-out rows, limits, the cache, collation."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest

from finetune.data import collate
from finetune.data.prepare import held_out_keys
from finetune.data.prepare import prepare as prepare_data
from finetune.data.sources import open_source
from finetune.data.token_cache import TokenRow
from finetune.errors import UserError
from finetune.recipe.fields import SourceSection
from tests.support.data import CHATML, chat_row, make_tokenizer, recipe_of, trained_texts, write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def prepare(loaded, tokenizer, lines=None):
    return prepare_data(loaded, tokenizer, (lines if lines is not None else []).append)


def texts(tokenizer, rows) -> list[str]:
    return [tokenizer.decode(rows.row(i).input_ids, clean_up_tokenization_spaces=False) for i in range(len(rows))]


def test_chat_rows_become_token_rows(tmp_path):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    rows = [chat_row(f"What is {i}?", f"It is {i}.") for i in range(5)]
    prepared = prepare(recipe_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer)
    train = prepared.train
    assert len(train) == 5 and prepared.evaluation is None
    for i in range(5):
        row = train.row(i)
        assert row.input_ids.dtype == row.labels.dtype == np.int32 and row.labels[0] == -100
        assert trained_texts(tokenizer, row) == [f"It is {i}.<|im_end|>"]
        assert train.lengths[i] == len(row.input_ids) and train.trained[i] == (row.labels != -100).sum()
    summary = prepared.summary
    assert (summary["rows"], summary["dropped"], summary["truncated"]) == (5, 0, 0)
    assert summary["tokens"] == train.lengths.sum() and summary["trained_tokens"] == train.trained.sum()
    assert summary["turns"] == summary["ends"] == 5
    assert summary["max_token_id"] == max(train.row(i).input_ids.max() for i in range(5))


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_text_is_joined_with_eos_and_cut_into_blocks(tmp_path, bos):
    tokenizer = make_tokenizer(None, bos=bos, add_bos=bos is not None)
    documents = ["The quick brown fox jumps over the lazy dog.", "Hello there!", "How are you today? " * 3]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    prepared = prepare(recipe_of(tmp_path, file, "data.loss_on=all", "data.max_length=16"), tokenizer)
    whole = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = [prepared.train.row(i) for i in range(len(prepared.train))]
    assert [token for row in rows for token in row.input_ids.tolist()] == whole
    assert set(prepared.train.lengths[:-1]) == {16} and 2 <= prepared.train.lengths[-1] <= 16
    assert all(row.labels[0] == -100 and (row.labels[1:] == row.input_ids[1:]).all() for row in rows)


def test_a_txt_file_is_one_document_and_sources_do_not_share_a_block(tmp_path):
    tokenizer = make_tokenizer(None)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("Hello.\n\nThere.", "\ufeffBye."), strict=True):
        file.write_text(text, encoding="utf-8")
    prepared = prepare(recipe_of(tmp_path, files, "data.loss_on=all"), tokenizer)
    assert texts(tokenizer, prepared.train) == ["Hello.\n\nThere.</s>", "Bye.</s>"]


def test_a_rest_of_one_token_is_no_row_and_empty_documents_are_dropped(tmp_path):
    tokenizer = make_tokenizer(None)
    length = len(tokenizer("Hello there!")["input_ids"])
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "Hello there!"}] * 10 + [{"text": " "}])
    prepared = prepare(recipe_of(tmp_path, file, "data.loss_on=all", f"data.max_length={length}"), tokenizer)
    total = 10 * (length + 1)
    assert len(prepared.train) == total // length + (total % length >= 2)
    assert prepared.summary["dropped"] == 1 and prepared.summary["source_rows"] == 11


def test_a_hub_data_set_is_read_through_datasets(tmp_path, monkeypatch):
    # datasets takes a folder below the working directory for a data set of that name: the same code as for the hub
    (tmp_path / "some" / "set").mkdir(parents=True)
    rows = [{"prompt": "a", **chat_row("Hello", f"Fine {i}")} for i in range(3)]
    write_jsonl(tmp_path / "some" / "set" / "train.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    source = open_source(SourceSection(path="some/set"), "recipe.yaml:4: data.train")
    assert source.kind == "chat" and source.identity == open_source(SourceSection(path="some/set"), "").identity
    assert [row.messages for row in source.read()] == [tuple(row["messages"]) for row in rows]
    assert next(source.read()).where == "some/set [train] row 0"
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train: 'some/set' \(split 'test'\).*Unknown split"):
        open_source(SourceSection(path="some/set", split="test"), "recipe.yaml:4: data.train")


def test_text_is_trained_whole_unless_the_recipe_asks_for_the_assistant_alone(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "Hello"}])
    train = prepare(recipe_of(tmp_path, file), make_tokenizer(None)).train
    assert train.trained[0] == train.lengths[0] - 1
    with pytest.raises(UserError, match=r"data.loss_on is 'assistant'.*Use data.loss_on: all"):
        prepare(recipe_of(tmp_path, file, "data.loss_on=assistant"), make_tokenizer(None))
    chat = write_jsonl(tmp_path / "b.jsonl", [chat_row("Hello", "Fine")])
    mixed = prepare(recipe_of(tmp_path, [file, chat], "data.loss_on=assistant"), make_tokenizer()).train
    assert mixed.trained[0] == mixed.lengths[0] - 1 and mixed.trained[1] < mixed.lengths[1] - 1


def test_a_tokenizer_without_chat_template_or_eos_is_refused(tmp_path):
    chat = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")])
    with pytest.raises(UserError, match=r"recipe.yaml:1: model.name_or_path: .*no chat template"):
        prepare(recipe_of(tmp_path, chat), make_tokenizer(None))
    text = write_jsonl(tmp_path / "b.jsonl", [{"text": "Hello"}])
    with pytest.raises(UserError, match="no eos token"):
        prepare(recipe_of(tmp_path, text, "data.loss_on=all"), make_tokenizer(None, eos=None))


def test_truncated_rows_are_counted(tmp_path):
    rows = [chat_row("Hi", "Hello there! " * (30 if i == 3 else 1)) for i in range(9)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    lines = []
    prepared = prepare(recipe_of(tmp_path, file, "data.max_length=32"), make_tokenizer(), lines)
    assert prepared.summary["truncated"] == 1 and prepared.train.lengths.max() == 32
    assert "1 truncated" in lines[-1] and "1 of 9 turns without a trained end" in lines[-1]


def test_dropped_rows_are_counted_up_to_a_tenth_and_refused_above(tmp_path):
    rows = [chat_row("Hello", "Fine") for _ in range(20)]
    silent = {"messages": [{"role": "user", "content": "Anybody?"}]}
    tokenizer, file = make_tokenizer(), tmp_path / "a.jsonl"
    prepared = prepare(recipe_of(tmp_path, write_jsonl(file, rows[:18] + [silent] * 2)), tokenizer)
    assert prepared.summary["dropped"] == 2 and len(prepared.train) == 18
    assert prepared.summary["reasons"] == {"it has no assistant turn": {"rows": 2, "example": f"{file}:19"}}
    loaded = recipe_of(tmp_path, write_jsonl(file, rows[:17] + [silent] * 3))
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"3 of 20 rows .* 10%.*3 because it has no assistant turn.*a.jsonl:18"):
            prepare(loaded, tokenizer)
    with pytest.raises(UserError, match="2 of 2 rows"):
        prepare(recipe_of(tmp_path, write_jsonl(file, [silent] * 2)), tokenizer)


def test_the_held_out_share_never_shares_a_row_with_training(tmp_path):
    rows = [chat_row(f"What is {i % 70}?", f"It is {i % 70}.") for i in range(100)]
    random.Random(0).shuffle(rows)
    tokenizer, file = make_tokenizer(), write_jsonl(tmp_path / "a.jsonl", rows)
    seen = set()
    for seed in (1, 2):
        loaded = recipe_of(tmp_path, file, "data.eval_fraction=0.2", f"training.seed={seed}")
        prepared = prepare(loaded, tokenizer)
        train, held_out = texts(tokenizer, prepared.train), texts(tokenizer, prepared.evaluation)
        assert not set(train) & set(held_out) and len(train) + len(held_out) == 100
        assert 20 <= len(held_out) <= 21 and prepared.summary["evaluation"]["rows"] == len(held_out)
        assert prepare(loaded, tokenizer).evaluation.fingerprint == prepared.evaluation.fingerprint
        seen.add(tuple(held_out))
    assert len(seen) == 2


def test_the_held_out_share_does_not_depend_on_row_order_and_one_row_cannot_be_split(tmp_path):
    keys = [bytes([i]) * 32 for i in range(50)]
    chosen = held_out_keys(keys, 0.1, 7)
    assert len(chosen) == 5 and held_out_keys(reversed(keys), 0.1, 7) == chosen
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")] * 3)
    with pytest.raises(UserError, match=r"data.eval_fraction leaves no rows"):
        prepare(recipe_of(tmp_path, file, "data.eval_fraction=0.5"), make_tokenizer())


def test_max_rows_caps_the_source_rows_before_the_split(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [chat_row(f"{name} {i}", "Fine") for i in range(10)]) for name in "ab"
    ]
    tokenizer = make_tokenizer()
    prepared = prepare(recipe_of(tmp_path, files, "data.max_rows=15", "data.eval_fraction=0.2"), tokenizer)
    both = texts(tokenizer, prepared.train) + texts(tokenizer, prepared.evaluation)
    assert len(prepared.evaluation) == 3
    assert sorted(text.split("\n")[1] for text in both) == sorted(
        [f"a {i}<|im_end|>" for i in range(10)] + [f"b {i}<|im_end|>" for i in range(5)]
    )


def test_evaluation_sources_are_prepared_like_training_ones(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")] * 3)
    held_out = write_jsonl(tmp_path / "b.jsonl", [chat_row("c", "d")] * 2)
    loaded = recipe_of(tmp_path, train, "data.max_rows=1", extra=f"  eval:\n    - path: {held_out}\n")
    prepared = prepare(loaded, make_tokenizer())
    assert (len(prepared.train), len(prepared.evaluation)) == (1, 2)


def test_the_cache_is_reused_until_something_that_matters_changes(tmp_path):
    rows = [chat_row(f"What is {i}?", f"It is {i}.") for i in range(20)]
    tokenizer, file = make_tokenizer(), write_jsonl(tmp_path / "a.jsonl", rows)

    def state(*overrides, tokenizer=tokenizer):
        prepared = prepare(recipe_of(tmp_path, file, *overrides), tokenizer)
        return prepared.summary["cache"], prepared.train.fingerprint

    assert state()[0] == "new"
    # neither the optimizer nor a call that pads changes the tokens, nor does the seed without a split
    assert state("training.learning_rate=1e-3", "training.seed=1")[0] == "reused"
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=4)
    assert state()[0] == "reused"
    assert state("data.max_length=64")[0] == "new"
    assert state("data.loss_on=completion")[0] == "new"
    assert state("data.eval_fraction=0.2")[0] == "new"
    assert state("data.eval_fraction=0.2", "training.seed=1")[0] == "new"
    assert state(tokenizer=make_tokenizer(CHATML.replace(r"'\n'", "' '")))[0] == "new"
    before = state()[1]
    write_jsonl(file, rows[:-1])
    assert state()[0] == "new" and state() == ("reused", state()[1]) and state()[1] != before
    write_jsonl(file, rows)
    assert state() == ("reused", before)


def test_a_damaged_cache_entry_is_made_again(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")] * 3)
    loaded, tokenizer = recipe_of(tmp_path, file), make_tokenizer()
    entry = Path(prepare(loaded, tokenizer).summary["cache_folder"])
    tokens = entry / "train" / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert prepare(loaded, tokenizer).summary["cache"] == "new"
    (entry / "summary.json").unlink()
    (entry.parent / f"{entry.name}.tmp-left-behind").mkdir()
    prepared = prepare(loaded, tokenizer)
    assert prepared.summary["cache"] == "new" and len(prepared.train) == 3


def _prepare_in_process(folder, file, barrier, results):
    loaded, tokenizer = recipe_of(Path(folder), Path(file)), make_tokenizer()
    barrier.wait()
    prepared = prepare_data(loaded, tokenizer, lambda line: None)
    results.put((prepared.summary["cache"], prepared.train.fingerprint, int(prepared.train.lengths.sum()), os.getpid()))


def test_of_two_processes_one_tokenises_and_both_open_the_result(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row(f"What is {i}?", "It is four. " * 9) for i in range(1500)])
    # forked, so that neither pays for importing torch again; each works in its own folder
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        arguments = (tmp_path / name, file, barrier, results)
        processes.append(context.Process(target=_prepare_in_process, args=arguments))
        processes[-1].start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(state for state, *_ in found) == ["new", "reused"]
    assert found[0][1:3] == found[1][1:3] and found[0][3] != found[1][3]
    assert not list((tmp_path / "cache" / "tokens").glob("*.tmp-*"))


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(blocked))
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")])
    with pytest.raises(UserError, match="FINETUNE_CACHE"):
        prepare(recipe_of(tmp_path, file), make_tokenizer())


@pytest.fixture
def two_rows() -> list[TokenRow]:
    return [
        TokenRow(np.array([5, 6, 7], np.int32), np.array([-100, 6, 7], np.int32)),
        TokenRow(np.array([8, 7], np.int32), np.array([-100, 7], np.int32)),
    ]


def listed(batch) -> dict:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in batch.inputs.items()}


def test_padding_is_known_by_length_and_never_trained(two_rows):
    batch = collate.padded(two_rows, pad_token_id=7)
    assert {str(values.dtype) for values in batch.inputs.values()} == {"torch.int64"}
    # positions 0 and 1 of the first row predict 6 and 7, position 0 of the second predicts 7
    assert listed(batch) == {
        "input_ids": [[5, 6, 7], [8, 7, 7]],
        "predicting": [0, 1, 3],
        "targets": [6, 7, 7],
    }
    assert (batch.shape, batch.trained_tokens, batch.input_tokens) == ((2, 3), 3, 5)
    empty = collate.padded([], pad_token_id=7)
    assert listed(empty) == {"input_ids": [[7, 7]], "predicting": [], "targets": []}
    assert (empty.trained_tokens, empty.input_tokens) == (0, 0)


def test_packed_rows_follow_each_other_and_begin_at_position_0(two_rows):
    batch = collate.packed(two_rows, pad_token_id=7)
    assert listed(batch) == {
        "input_ids": [[5, 6, 7, 8, 7]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "segment_lengths": (3, 2),
        "predicting": [0, 1, 3],
        "targets": [6, 7, 7],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert (batch.shape, batch.trained_tokens, batch.input_tokens) == ((1, 5), 3, 5)
    empty = collate.packed([], pad_token_id=7)
    assert empty.shape == (1, 2) and empty.inputs["segment_lengths"] == (2,) and empty.trained_tokens == 0


@pytest.mark.skipif("FINETUNE_REAL_DATA" not in os.environ, reason="FINETUNE_REAL_DATA is not set")
def test_the_real_demo_sets_of_known_formats_are_taken_whole(tmp_path):
    folder, tokenizer = Path(os.environ["FINETUNE_REAL_DATA"]), make_tokenizer()
    documents = (folder / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    loaded = recipe_of(tmp_path, folder / "c4_demo.jsonl", "data.loss_on=all", "data.max_length=512")
    prepared = prepare(loaded, tokenizer)
    assert prepared.summary["source_rows"] == len(documents) and not prepared.summary["dropped"]
    tokens = np.concatenate([prepared.train.row(i).input_ids for i in range(len(prepared.train))])
    assert tokenizer.decode(tokens) == "".join(json.loads(line)["text"] + "</s>" for line in documents)
    chats = json.loads((folder / "kto_en_demo.json").read_text(encoding="utf-8"))
    prepared = prepare(recipe_of(tmp_path, folder / "kto_en_demo.json", "data.max_length=100000"), tokenizer)
    assert len(prepared.train) == len(chats) and not prepared.summary["dropped"]
    for i, chat in enumerate(chats):
        answers = [m["content"] + "<|im_end|>" for m in chat["messages"] if m["role"] == "assistant"]
        assert trained_texts(tokenizer, prepared.train.row(i)) == answers
