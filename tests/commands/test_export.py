"""`finetune export`: adapter and base become one model that answers the same, ties kept; what does not agree is not
written.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.commands.export import merge_adapter
from finetune.errors import UserError
from finetune.model.merge import TOLERANCES
from finetune.model.save import BrokenExport, write_model
from tests.support.tiny_models import tiny_model


def make_adapter(folder: Path, scale: float = 0.1, targets="all-linear", in_4_bits: bool = False, **model) -> Path:
    """A base and an adapter on it, as a run leaves them."""
    base = tiny_model(folder / "base", **model)
    options = {}
    if in_4_bits:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    network = AutoModelForCausalLM.from_pretrained(base, **options)
    network = get_peft_model(network, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    state = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    write_model(state, network, AutoTokenizer.from_pretrained(base), folder / "adapter", "float32")
    return folder / "adapter"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(40)[None]).logits


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_merged_answers_like_base_with_adapter(tmp_path, tie, dtype):
    adapter = make_adapter(tmp_path, tie=tie)
    text = merge_adapter(adapter, tmp_path / "new" / "merged", dtype)
    assert dtype in text and f"allowed {TOLERANCES[dtype]:g}" in text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged")
    assert merged.dtype == getattr(torch, dtype)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "merged" / "model.safetensors")) == (not tie)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain, wanted = logits(base), logits(PeftModel.from_pretrained(base, adapter))
    error = (logits(merged).float() - wanted).norm() / wanted.norm()
    assert error < 2 * TOLERANCES[dtype] < (plain - wanted).norm() / wanted.norm()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new" / "merged")) > 300


def test_auto_takes_the_dtype_of_the_base(tmp_path):
    adapter = make_adapter(tmp_path)
    (adapter / "finetune_base.json").unlink()  # as peft alone writes it
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert ", bfloat16. Logits" in merge_adapter(adapter, tmp_path / "merged")


def test_a_4_bit_base_is_merged_as_its_4_bit_values(tmp_path):
    adapter = make_adapter(tmp_path, in_4_bits=True)
    merge_adapter(adapter, tmp_path / "merged")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    weight = quantised.dequantize(torch.float32).model.layers[1].mlp.up_proj.weight
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    wanted = weight + 8 / 4 * tensors[prefix + "B.weight"] @ tensors[prefix + "A.weight"]  # peft's default alpha is 8
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, wanted, rtol=1e-5, atol=1e-6)
    assert getattr(merged.config, "quantization_config", None) is None


def test_weights_that_the_dtype_cannot_hold_are_not_published(tmp_path):
    adapter = make_adapter(tmp_path, scale=1e7)
    with pytest.raises(BrokenExport, match="logits are .* off the adapter's .*/merged was not written"):
        merge_adapter(adapter, tmp_path / "merged", "float16")
    assert not list(tmp_path.glob("merged*"))


def test_what_cannot_be_merged_is_refused(tmp_path):
    adapter = make_adapter(tmp_path)
    with pytest.raises(UserError, match="base: is a full model already"):
        merge_adapter(tmp_path / "base", tmp_path / "merged")
    with pytest.raises(UserError, match="adapter: exists already"):
        merge_adapter(adapter, adapter)
    with pytest.raises(UserError, match="missing: no such model folder"):
        merge_adapter(tmp_path / "missing", tmp_path / "merged")
    with pytest.raises(UserError, match="--dtype is half"):
        merge_adapter(adapter, tmp_path / "merged", "half")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="base of the adapter .*: its model cannot be loaded"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_tied_embeddings_is_refused(tmp_path):
    adapter = make_adapter(tmp_path / "tied", targets=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="changes lm_head, whose weights the model uses twice"):
        merge_adapter(adapter, tmp_path / "merged")
    untied = make_adapter(tmp_path / "untied", targets=["q_proj", "lm_head"], tie=False)
    merge_adapter(untied, tmp_path / "merged")
