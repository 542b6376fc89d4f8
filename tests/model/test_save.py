"""What is written is what was trained: names, shapes and values on disk; damaged files and half-gathered states are
refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from finetune.model.save import BrokenExport, check_folder, write_model
from finetune.model.tokenizer import stop_token_ids
from tests.support.tiny_models import tiny_model


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an engine's gather_state hands over."""
    adapter = hasattr(model, "peft_config")
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad or not adapter}


def adapter_on(base: Path) -> torch.nn.Module:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family, tie", [("llama", True), ("llama", False), ("qwen3", True)])
def test_a_full_model_loads_as_it_was(tmp_path, tokenizer, family, tie, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base", family, tie=tie), dtype=torch.float32)
    wanted = gathered(model)
    write_model(gathered(model), model, tokenizer, tmp_path / "out", dtype)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.dtype == getattr(torch, dtype)  # the config says what the file holds
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tie)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, wanted[name].to(parameter.dtype)), name
    assert not (tmp_path / "out.tmp").exists()


def test_a_mixture_of_experts_is_written_in_its_published_form(tmp_path, tokenizer):
    config = Qwen3MoeConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    write_model(gathered(model), model, tokenizer, tmp_path / "out", "float32")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    assert any(".experts.3.up_proj" in name for name in after), "one tensor per expert, as people publish it"
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_says_what_it_sits_on(tmp_path, base, tokenizer):
    model = adapter_on(base)
    write_model(gathered(model), model, tokenizer, tmp_path / "out", "float32")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert json.loads((tmp_path / "out" / "finetune_base.json").read_text()) == {"dtype": "float32"}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_generation_stops_at_the_end_of_turn_also_beside_an_odd_config(tmp_path, base, tokenizer):
    turn_end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    assert turn_end != eos
    assert stop_token_ids(tokenizer) == [turn_end, eos]
    folder = tiny_model(tmp_path / "base")
    # as some published models have it: transformers refuses to save it once it has been changed
    odd = {"eos_token_id": eos, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_model(gathered(model), model, tokenizer, tmp_path / "out", "float32")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [eos, turn_end]
    assert written["top_p"] == 0.6
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    assert stop_token_ids(tokenizer) == [eos]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_a_state_that_was_not_gathered_whole_is_not_published(tmp_path, base, tokenizer, adapter):
    model = adapter_on(base) if adapter else AutoModelForCausalLM.from_pretrained(base)
    name = next(n for n in gathered(model) if "layers.1" in n and "q_proj" in n)
    for broken in (None, torch.empty(0)):  # not gathered at all, and the placeholder of a ZeRO-3 shard
        state = gathered(model) | {name: broken}
        with pytest.raises(BrokenExport, match=name):
            write_model(state, model, tokenizer, tmp_path / "out", "float32")
    state = gathered(model)
    del state[name]
    with pytest.raises(BrokenExport, match="1 weights were not gathered whole"):
        write_model(state, model, tokenizer, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_did_not_move_is_not_published(tmp_path, base, tokenizer):
    model = adapter_on(base)
    still = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in gathered(model).items()}
    with pytest.raises(BrokenExport, match="all adapter weights are zero"):
        write_model(still, model, tokenizer, tmp_path / "out", "float32")
    infinite = {n: t / 0 if "layers.0.mlp.up_proj.lora_B" in n else t for n, t in gathered(model).items()}
    with pytest.raises(BrokenExport, match="not finite: .*up_proj.lora_B"):
        write_model(infinite, model, tokenizer, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return load(file.read_bytes())  # a copy: load_file maps the file, which is about to be overwritten


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def zero(file: Path) -> None:
    save_file({n: torch.zeros_like(t) for n, t in tensors_of(file).items()}, file)


def drop(file: Path) -> None:
    tensors = tensors_of(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file)


def cut(file: Path) -> None:
    tensors = tensors_of(file)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first][:3].contiguous()}, file)


def empty(file: Path) -> None:
    save_file({n: t[:0].contiguous() for n, t in tensors_of(file).items()}, file)


def add(file: Path) -> None:
    save_file(tensors_of(file) | {"wrapper.weight": torch.ones(2)}, file)


DAMAGE = {
    truncate: "cannot be read back",
    drop: "missing: ",
    cut: "has shape",
    empty: "empty: ",
    add: "not a tensor of this model: wrapper.weight",
    Path.unlink: "no tensor was written",
}
CASES = [(adapter, *case) for adapter in (False, True) for case in DAMAGE.items()]
CASES += [(True, zero, "zero")]  # of a full model names and shapes are read back, not the values


@pytest.mark.parametrize(
    "adapter, damage, said", CASES, ids=[f"{'adapter' if a else 'full'}-{d.__name__}" for a, d, _ in CASES]
)
def test_damaged_files_are_seen(tmp_path, base, tokenizer, adapter, damage, said):
    model = adapter_on(base) if adapter else AutoModelForCausalLM.from_pretrained(base)
    out = tmp_path / "out"
    write_model(gathered(model), model, tokenizer, out, "float32")
    file = out / ("adapter_model.safetensors" if adapter else "model.safetensors")
    expected = {name: tuple(t.shape) for name, t in tensors_of(file).items()}
    check_folder(out, expected, adapter)
    damage(file)
    with pytest.raises(BrokenExport, match=said):
        check_folder(out, expected, adapter)
