"""The model as it is made ready for training: what is refused, what is trained, and that nothing changes the
gradient.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_in
from safetensors.torch import save_file
from transformers import AutoTokenizer

from finetune.data.collate import padded
from finetune.data.token_cache import TokenRow
from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.launch.preflight import resolve
from finetune.launch.strategy import one_process
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.parameters import parameter_counts
from finetune.model.tokenizer import padding_id
from finetune.objectives.sft import sft_loss
from finetune.recipe.load import load_recipe
from tests.support.tiny_models import small_recipe

CPU = torch.device("cpu")
LORA = ("lora.r=4", "lora.alpha=8")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("model"))


def load(path: Path, *overrides: str):
    loaded = load_recipe(path, overrides)
    return load_model(loaded, one_process(), read_facts(loaded), CPU)


def batch() -> dict:
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 400, (n,), generator=random, dtype=torch.int32).numpy() for n in (12, 33)]
    return padded([TokenRow(ids, np.append(-100, ids[1:])) for ids in rows], 0).inputs


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    network.zero_grad()
    for name, parameter in network.named_parameters():  # B starts at zero, and with it A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    sft_loss(network, **batch()).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("overrides", [(), LORA, (*LORA, "model.load_in_4bit=true")], ids=["full", "LoRA", "QLoRA"])
def test_gradient_checkpointing_gives_the_same_gradients(recipe_path, overrides):
    without = gradients(load(recipe_path, *overrides, "training.gradient_checkpointing=false"))
    network = load(recipe_path, *overrides)
    assert network.is_gradient_checkpointing
    found = gradients(network)
    assert found.keys() == without.keys()
    for name, wanted in without.items():
        assert wanted.any(), name
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7, msg=name)


def test_an_evaluation_leaves_the_gradient_of_4_bit_layers_alone(recipe_path):
    network = load(recipe_path, *LORA, "model.load_in_4bit=true")
    before = gradients(network)
    network.eval()
    with torch.no_grad():
        first = sft_loss(network, **batch())
    network.train()
    after = gradients(network)
    with torch.no_grad():
        assert sft_loss(network, **batch()) == first
    for name, wanted in before.items():
        assert torch.equal(after[name], wanted), name


def test_only_adapters_train_in_float32_and_all_parameters_are_counted(recipe_path):
    counts = {}
    for name, overrides in {"full": (), "LoRA": LORA, "QLoRA": (*LORA, "model.load_in_4bit=true")}.items():
        network = load(recipe_path, *overrides)
        trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for _, p in trained)
        assert name == "full" or all("lora_" in n for n, _ in trained)
        counts[name] = parameter_counts(network)
    assert counts["full"][0] == counts["full"][1] > 30_000
    assert counts["LoRA"] == counts["QLoRA"] == (counts["LoRA"][0], counts["LoRA"][0] + counts["full"][1])


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, *overrides)
    (message,) = error.value.messages
    assert "\n" not in message
    return message


def test_4_bit_without_lora_is_refused_naming_both_keys(recipe_path):
    message = refused(recipe_path, "model.load_in_4bit=true")
    assert "model.load_in_4bit" in message and "lora" in message


def test_an_attention_kernel_that_is_not_installed_is_refused_by_its_key(recipe_path):
    message = refused(recipe_path, "model.attn_implementation=flash_attention_2")
    assert (
        "model.attn_implementation is flash_attention_2, which does not work for" in message and "installed" in message
    )


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_attention_kernel_is_the_one_asked_for(recipe_path, kernel):
    loaded = load_recipe(recipe_path, [f"model.attn_implementation={kernel}"])
    network = load_model(loaded, one_process(), read_facts(loaded), CPU)
    assert network.config._attn_implementation == kernel


def test_4_bit_under_zero_3_is_refused_before_weights(recipe_path, tmp_path):
    from tests.support.launch import launch_file

    loaded = load_recipe(recipe_path, [*LORA, "model.load_in_4bit=true"])
    resolve(loaded, read_launch_file(launch_file(tmp_path / "zero2.yaml", 2, zero_stage=2)))
    with pytest.raises(UserError, match="model.load_in_4bit is true, which is not supported with ZeRO-3.*zero3.yaml"):
        resolve(loaded, read_launch_file(launch_file(tmp_path / "zero3.yaml", 2, zero_stage=3)))


def test_layers_that_do_not_exist_are_refused_with_those_that_do(recipe_path):
    message = refused(recipe_path, "lora.target_modules=[query]")
    assert "lora.target_modules" in message and "q_proj" in message


def test_a_damaged_checkpoint_is_refused(recipe_path, tmp_path):
    path = small_recipe(tmp_path / "job")
    file = tmp_path / "job" / "base" / "model.safetensors"
    whole = file.read_bytes()
    tensors = tensors_in(whole)

    file.write_bytes(whole[: len(whole) // 2])
    assert "weights cannot be loaded" in refused(path)

    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    assert f"lacks 1 weights of LlamaForCausalLM, or has them in another shape ({name})" in refused(path)

    save_file(tensors | {name: tensors[name][:7].contiguous()}, file, metadata={"format": "pt"})
    assert f"({name})" in refused(path)


def test_padding_leaves_the_tokenizer_alone_and_stays_inside_the_embedding(recipe_path):
    tokenizer = AutoTokenizer.from_pretrained(recipe_path.parent / "base")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert padding_id(tokenizer, 448) == pad
    assert padding_id(tokenizer, pad) == (eos if eos < pad else 0)  # a pad token added after the embedding's end
    tokenizer.pad_token = None
    assert padding_id(tokenizer, 448) == eos
    assert tokenizer.pad_token is None
