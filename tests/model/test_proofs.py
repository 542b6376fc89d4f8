"""Whether a model keeps packed rows apart is proved, family by family; what does not pass is trained padded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.batching.plan import BatchPlan
from finetune.launch.strategy import one_process
from finetune.model import proofs, segment_attention
from finetune.model.facts import ModelFacts
from finetune.model.proofs import takes_fused_loss, why_not_isolated
from finetune.recipe.load import LoadedRecipe, load_recipe
from finetune.training.job import fastest

ISOLATED = (
    "llama qwen2 qwen3 qwen2_moe qwen3_moe mistral mixtral gemma gemma2 gemma3_text phi phi3 granite granitemoe olmo"
    " olmo2 olmo3 gpt2 gpt_neox gpt_bigcode opt cohere cohere2 starcoder2 smollm3 glm4 exaone4 ernie4_5 helium"
    " modernbert-decoder deepseek_v3"
).split()
PADDED = {  # and a part of the reason
    "llama4_text": "differ from samples alone",  # chunked attention
    "stablelm": "differ from samples alone",  # its layers hand nothing on
    "bloom": "differ from samples alone",  # alibi
    "gptj": "do not run on a packed row",  # attention of its own
    "gpt_oss": "asks for s_aux",  # attention sinks
    "lfm2": "differ from samples alone",  # convolutions over the row
}
SLOW = {"falcon_h1": "differ from samples alone", "qwen3_next": "can't keep packed sequences apart"}  # recurrent


def recipe_of(folder: Path, family: str) -> LoadedRecipe:
    """A recipe whose model is a config of this family, without weights."""
    options = {"layer_types": ["conv", "full_attention"] * 16} if family == "lfm2" else {}
    config = CONFIG_MAPPING[family](**options)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    config.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text(
        "model: {name_or_path: model}\ndata: {train: [{path: rows.jsonl}]}\noutput_dir: run\n"
    )
    return load_recipe(folder / "recipe.yaml", [])


@pytest.fixture(autouse=True)
def quietly():
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("family", ISOLATED)
def test_families_whose_rows_are_packed(tmp_path, family):
    assert why_not_isolated(recipe_of(tmp_path, family), segment_attention.SEGMENTS) == ""


@pytest.mark.parametrize("family", [*PADDED, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_families_whose_rows_are_padded(tmp_path, family):
    assert (PADDED | SLOW)[family] in why_not_isolated(recipe_of(tmp_path, family), segment_attention.SEGMENTS)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "cohere2"])
def test_a_window_that_gets_lost_is_noticed(tmp_path, family, monkeypatch):
    real = segment_attention.segment_attention
    forgetful = lambda *args, sliding_window=None, **options: real(*args, **options)  # noqa: E731
    monkeypatch.setattr(segment_attention, "segment_attention", forgetful)
    loaded = recipe_of(tmp_path, family)
    assert "differ from samples alone" in why_not_isolated(loaded, segment_attention.SEGMENTS)
    monkeypatch.undo()
    assert why_not_isolated(loaded, segment_attention.SEGMENTS) == ""


def test_samples_that_see_each_other_are_noticed(tmp_path, monkeypatch):
    real = segment_attention.segment_attention
    one = lambda *args, segment_lengths=None, **options: real(*args, **options)  # noqa: E731
    monkeypatch.setattr(segment_attention, "segment_attention", one)
    assert "differ" in why_not_isolated(recipe_of(tmp_path, "llama"), segment_attention.SEGMENTS)


def test_what_cannot_be_packed_is_padded_and_said_in_one_line(tmp_path):
    said: list[str] = []
    facts, plan = ModelFacts("BloomForCausalLM", 64, 64, "float32"), BatchPlan(8, 2, 4, 1, row_tokens=64)
    loaded = recipe_of(tmp_path, "bloom")
    found, batch = fastest(loaded, one_process(use_cpu=True), facts, plan, said.append)
    assert batch.row_tokens is None and found.attention == ""
    (line,) = said
    assert "recipe.yaml:2: data.packing is true, but BloomForCausalLM cannot keep packed rows apart: packed" in line
    assert line.endswith("Its rows are padded: the same mathematics, slower.")
    loaded = recipe_of(tmp_path, "llama")
    found, batch = fastest(loaded, one_process(use_cpu=True), facts, plan, said.append)
    assert batch.row_tokens == 64 and found.attention == segment_attention.SEGMENTS and len(said) == 1


def test_the_proof_leaves_randomness_alone(tmp_path):
    loaded = recipe_of(tmp_path, "llama")
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    why_not_isolated(loaded, segment_attention.SEGMENTS)
    assert torch.equal(torch.rand(3), wanted)
    assert proofs.TOLERANCE == 1e-4


@pytest.mark.parametrize(
    "family, plain",
    [
        *((family, True) for family in ("llama", "qwen3", "gpt2", "phi")),
        *((family, False) for family in ("gemma2", "granite", "cohere2")),
    ],
)
def test_a_head_computes_the_loss_only_where_the_logits_are_used_as_they_are(tmp_path, family, plain):
    loaded = recipe_of(tmp_path, family)
    if family == "granite":  # 1.0 scales nothing
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))
    assert takes_fused_loss(loaded) is plain


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "qwen3_moe"])
def test_in_bf16_the_proof_passes_for_what_is_right_alone(tmp_path, family, monkeypatch):
    loaded = recipe_of(tmp_path, family)
    # as on a GPU with flash kernels; the CPU's own stands in for theirs
    monkeypatch.setattr(proofs, "FLASH", (segment_attention.SEGMENTS,))
    assert why_not_isolated(loaded, segment_attention.SEGMENTS, torch.device("cpu")) == ""
    real = segment_attention.segment_attention
    one = lambda *args, segment_lengths=None, **options: real(*args, **options)  # noqa: E731
    monkeypatch.setattr(segment_attention, "segment_attention", one)
    assert "differ" in why_not_isolated(loaded, segment_attention.SEGMENTS, torch.device("cpu"))


@pytest.mark.parametrize(
    "override, on_flash, kernel",
    [
        ("model.attn_implementation=auto", True, segment_attention.VARLEN),
        ("model.attn_implementation=sdpa", True, segment_attention.VARLEN),
        ("model.attn_implementation=auto", False, segment_attention.SEGMENTS),
        ("model.attn_implementation=eager", True, "eager"),
        ("model.attn_implementation=flash_attention_2", True, "flash_attention_2"),
    ],
)
def test_the_kernel_is_the_recipes_or_the_fastest_there_is(tmp_path, override, on_flash, kernel):
    recipe_of(tmp_path, "llama")
    loaded = load_recipe(tmp_path / "recipe.yaml", [override])
    device = torch.device("cpu") if on_flash else None
    assert proofs.packing_kernel(loaded, one_process("bf16"), device) == kernel
    if kernel == segment_attention.VARLEN:
        for other in (one_process("no"), one_process("bf16", use_cpu=True)):
            assert proofs.packing_kernel(loaded, other, device) == segment_attention.SEGMENTS


def test_eager_attention_keeps_rows_apart_by_its_own_mask(tmp_path):
    assert why_not_isolated(recipe_of(tmp_path, "llama"), "eager") == ""
