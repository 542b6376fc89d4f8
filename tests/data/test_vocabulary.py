"""Tokens the model or the tokenizer lacks: the embedding grows, padding gives way, or it is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.prepare import prepare
from finetune.errors import UserError
from finetune.launch.strategy import Strategy, one_process
from finetune.model.load import grow_embedding
from finetune.model.tokenizer import padding_id
from finetune.recipe.load import load_recipe
from finetune.training import job, step
from tests.support.chat_templates import CHATML
from tests.support.data import chat_row, make_tokenizer, recipe_of, write_jsonl
from tests.support.tiny_models import small_recipe, tiny_model

FULL = ("training.max_steps=1", "data.eval_fraction=0.1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_are_the_mean_of_the_old_and_ties_are_kept(tmp_path, tie):
    network = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base", tie=tie))
    before = network.get_input_embeddings().weight.detach().clone()
    head = network.get_output_embeddings().weight.detach().clone()
    grow_embedding(network, 500)
    after = network.get_input_embeddings().weight
    assert after.shape[0] == network.config.vocab_size == 500 and torch.equal(after[:448], before)
    assert torch.equal(after[448:], before.mean(0).expand(52, -1))
    assert torch.equal(network.get_output_embeddings().weight[448:], head.mean(0).expand(52, -1))
    assert (network.get_output_embeddings().weight is after) == tie
    assert network(torch.tensor([[499]])).logits.shape[-1] == 500


def with_new_tokens(folder, *words):
    """A recipe whose tokenizer has more entries than the model's embedding, and whose data uses them."""
    path = small_recipe(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens([f"<new{i}>" for i in range(448 - len(tokenizer))] + list(words))
    tokenizer.save_pretrained(folder / "base")
    write_jsonl(folder / "chat.jsonl", [chat_row(f"Say {i}", f"{i} {word}") for i in range(8) for word in words])
    return path, tokenizer


def test_the_embedding_grows_for_tokens_of_the_data_and_trains(tmp_path):
    path, tokenizer = with_new_tokens(tmp_path, "<think>", "</think>")
    plan = job.prepare(load_recipe(path, FULL), one_process(), print)
    assert plan.facts.vocabulary == len(tokenizer) == 450
    running = job.assemble(plan, print)
    (result,) = step.train(running)
    assert result.applied and result.tokens > 0
    running.engine.close()


def test_an_embedding_that_cannot_grow_is_refused_before_weights(tmp_path):
    path, _ = with_new_tokens(tmp_path, "<think>")
    with pytest.raises(UserError, match=r"recipe.yaml:1: .*token id 448 \('<think>'\).*ends at 447.*lora"):
        job.prepare(load_recipe(path, (*FULL, "lora.r=2")), one_process(), print)
    strategy = Strategy(**(vars(one_process()) | {"engine": "deepspeed", "zero_stage": 3}))
    with pytest.raises(UserError, match="under ZeRO-3 it cannot grow"):
        job.prepare(load_recipe(path, FULL), strategy, print)


def test_a_pad_token_outside_the_embedding_gives_way(tmp_path):
    path = small_recipe(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens([f"<new{i}>" for i in range(448 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 448
    tokenizer.save_pretrained(tmp_path / "base")
    plan = job.prepare(load_recipe(path, (*FULL, "lora.r=2")), one_process(), print)
    assert plan.facts.vocabulary == 448
    assert padding_id(plan.tokenizer, 448) == plan.tokenizer.eos_token_id


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    path = small_recipe(tmp_path)
    make_tokenizer(pad=None).save_pretrained(tmp_path / "base")
    plan = job.prepare(load_recipe(path, FULL), one_process(), print)
    assert padding_id(plan.tokenizer, plan.facts.vocabulary) == plan.tokenizer.eos_token_id


def test_an_end_of_turn_that_is_no_token_is_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "b")])
    lacking = make_tokenizer(CHATML, special=("</s>", "<pad>"))
    with pytest.raises(UserError, match=r"recipe.yaml:1: .*ends every turn with <\|im_end\|>, which its tokenizer"):
        prepare(recipe_of(tmp_path, file), lacking, print)


def test_turns_whose_ends_are_all_cut_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat_row("a", "Hello there! " * 40)] * 3)
    with pytest.raises(UserError, match="never learn to stop"):
        prepare(recipe_of(tmp_path, file, "data.max_length=32"), make_tokenizer(), print)
