"""`finetune data`: what it prints, its JSON document, and when it says that training would be wrong."""

from __future__ import annotations

import json
import os
import tempfile

import pytest
from rich.console import Console
from typer.testing import CliRunner

from finetune.commands.cli import app
from finetune.report.views.data import show
from tests.support.data import LLAMA3, chat_row, make_tokenizer, write_jsonl
from tests.support.tiny_models import small_recipe

RUNNER = CliRunner()
SILENT = [{"messages": [{"role": "user", "content": "c"}]}]
# Documented in finetune.commands.data_document.examine and docs/data.md: scripts read them.
KEYS = set("ok problems warnings notes recipe loss_on max_length sources train evaluation samples cache".split())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def document_of(recipe, *overrides, exit_code=0):
    with tempfile.TemporaryFile() as file:  # the document goes to file descriptor 1, which the runner does not catch
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            result = RUNNER.invoke(app, ["data", str(recipe), *overrides, "--json"])
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        assert result.exit_code == exit_code, result.output
        file.seek(0)
        return json.loads(file.read()), result.stderr


def test_the_document_has_its_keys_and_the_rows_as_the_model_sees_them(tmp_path):
    recipe = small_recipe(tmp_path)
    rows = [chat_row("Hello", "Fine"), chat_row("Hi", "Bye"), chat_row("Hi", "Bye"), chat_row("Hi", "So. " * 99)]
    write_jsonl(tmp_path / "chat.jsonl", rows)
    document, _ = document_of(recipe, "--rows", "2", "data.eval=[{path: chat.jsonl}]")
    assert set(document) == KEYS and document["ok"] and document["problems"] == []
    train = document["train"]
    assert (train["rows"], train["duplicates"], train["truncated"], train["double_bos"], train["only_ends"]) == (
        4,
        1,
        1,
        0,
        0,
    )
    assert (train["turns"], train["ends"]) == (4, 3) and document["evaluation"]["also_in_train"] == 4
    lengths = train["lengths"]
    assert sum(rows for _, _, rows in lengths["histogram"]) == 4 and lengths["histogram"][-1][1] == lengths["max"] == 64
    first = document["samples"][0]
    assert [sample["row"] for sample in document["samples"]] == [0, 2]
    assert (
        "".join(text for text, _, _ in first["pieces"])
        == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nFine<|im_end|>\n"
    )
    assert [piece for piece in first["pieces"] if piece[1]] == [["Fine", True, False], ["<|im_end|>", True, True]]
    assert any("turns end with <|im_end|>, but neither" in warning for warning in document["warnings"])
    assert any("evaluation rows are training rows too" in warning for warning in document["warnings"])


@pytest.mark.parametrize("template", [LLAMA3, "{{ bos_token }}" + LLAMA3])
def test_two_bos_are_wrong(tmp_path, template):
    recipe = small_recipe(tmp_path)
    make_tokenizer(template, bos="<s>", eos="<|eot_id|>", add_bos=True).save_pretrained(tmp_path / "base")
    twice = template != LLAMA3
    document, stderr = document_of(recipe, exit_code=2 if twice else 0)
    assert (document["train"]["double_bos"] > 0) == twice == bool(document["problems"])
    assert not twice or "rows begin with two <s>" in stderr


def test_too_many_dropped_rows_are_shown_with_their_reasons(tmp_path):
    recipe = small_recipe(tmp_path)
    write_jsonl(tmp_path / "chat.jsonl", [chat_row(f"a{i}", "b") for i in range(9)] + SILENT * 3)
    result = RUNNER.invoke(app, ["data", str(recipe), "data.eval_fraction=0.3"])
    assert result.exit_code == 2 and "because it has no assistant turn (first:" in result.stdout
    assert "cannot be trained on, at most 10% may be dropped" in result.stderr
    document, _ = document_of(recipe, "data.eval_fraction=0.3", exit_code=2)
    assert document["train"]["dropped"] in (0, 3) and not document["ok"]


def test_what_cannot_be_read_is_a_document_too(tmp_path):
    recipe = small_recipe(tmp_path)
    (tmp_path / "chat.jsonl").write_text("oops")
    document, stderr = document_of(recipe, exit_code=2)
    assert set(document) == {"ok", "problems"} and "chat.jsonl:1: not a JSON object" in document["problems"][0]
    assert "chat.jsonl:1" in stderr and "Traceback" not in stderr


def test_rows_longer_than_the_model_are_wrong(tmp_path):
    recipe = small_recipe(tmp_path)
    document, _ = document_of(recipe, "data.max_length=2048")
    assert document["ok"]
    write_jsonl(tmp_path / "chat.jsonl", [chat_row(f"{i}", "so it goes " * 60) for i in range(30)])
    document, _ = document_of(recipe, "data.max_length=2048", exit_code=2)
    assert "positions" in document["problems"][0]


@pytest.mark.parametrize("colours", [True, False])
def test_the_terminal_shows_what_is_trained(tmp_path, colours, capsys):
    recipe = small_recipe(tmp_path)
    document, _ = document_of(recipe)
    console = Console(force_terminal=colours, color_system="standard" if colours else None, width=100)
    show(document, console)
    printed = capsys.readouterr().out
    assert "tokens per row" in printed and "row 1 of" in printed
    assert ("\x1b[32m" in printed) == colours and ("⟦" in printed) == (not colours)
    assert len(printed.splitlines()) < 80
