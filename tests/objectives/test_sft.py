"""The loss of the trained positions alone equals the plain loss over all logits, in float64, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from finetune.data.collate import packed, padded
from finetune.data.token_cache import TokenRow
from finetune.model.segment_attention import SEGMENTS, register
from finetune.objectives import fused_cross_entropy
from finetune.objectives.sft import fused_sft_loss, selected_logits, sft_loss

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
MODELS = {
    "llama": ("Llama", {}),
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "soft-capped logits": ("Gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 4}),
    "scaled logits": ("Granite", {"logits_scaling": 7.0}),
    "scaled the other way": ("Cohere2", {"logit_scale": 0.3, "sliding_window": 4}),
}


def rows() -> list[TokenRow]:
    random = np.random.default_rng(0)
    found = []
    for length in (5, 12, 2, 9):
        ids = random.integers(1, 64, length)
        labels = np.where(random.random(length) < 0.6, ids, -100)
        labels[0] = -100
        found.append(TokenRow(ids, labels))
    return found


def model_of(name: str, attention: str | None = None) -> torch.nn.Module:
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    register()
    chosen = {"attn_implementation": attention} if attention else {}
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, **chosen)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def plain_loss(model: torch.nn.Module) -> torch.Tensor:
    """Row by row, logits everywhere."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows():
        ids, labels = torch.from_numpy(row.input_ids)[None], torch.from_numpy(row.labels)[None]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """The loss is computed in float32; to compare more exactly, here it stays in the model's type."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name, layout):
    model = model_of(name)
    wanted = plain_loss(model)
    expected = gradients(model, wanted)
    mine = model_of(name, SEGMENTS if layout == "packed" else None)
    mine.load_state_dict(model.state_dict())
    found = sft_loss(mine, **(packed if layout == "packed" else padded)(rows(), 0).inputs)
    # rotary embeddings and norms compute in float32 whatever the weights' type
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for parameter, gradient in gradients(mine, found).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_adapters_on_the_head_are_part_of_it(targets):
    import peft

    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(r=4, target_modules=targets)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = plain_loss(model)
    expected = gradients(model, wanted)
    found = sft_loss(model, **padded(rows(), 0).inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.any(), name


def test_only_the_trained_positions_have_logits():
    model, batch, seen = model_of("llama"), padded(rows(), 0), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    sft_loss(model, **batch.inputs)
    assert seen == [(1, batch.trained_tokens, 64)] and batch.trained_tokens < 4 * 12


def test_a_head_that_is_not_called_as_a_module_costs_memory_and_nothing_else(monkeypatch):
    model = model_of("llama")
    inputs = dict(padded(rows(), 0).inputs)
    wanted = sft_loss(model, **inputs)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    predicting = inputs.pop("predicting")
    targets = inputs.pop("targets")
    found = selected_logits(model, predicting, inputs)
    torch.testing.assert_close(F.cross_entropy(found, targets, reduction="sum"), wanted)


@pytest.mark.parametrize("collate", [padded, packed])
def test_an_empty_micro_batch_gives_zero_and_zero_gradients(collate):
    model = model_of("llama", SEGMENTS)
    loss = sft_loss(model, **collate([], 0).inputs)
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found and not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("positions", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_loss_in_chunks_equals_the_plain_one(monkeypatch, positions, bias):
    monkeypatch.setattr(fused_cross_entropy, "CHUNK_ELEMENTS", 64 * 30)
    random = torch.Generator().manual_seed(positions)
    made = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((positions, 8), (30, 8), (30,))]
    targets = torch.randint(0, 30, (positions,), generator=random)
    found = []
    for fused in (True, False):
        hidden, weight, offset = (t.clone().requires_grad_() for t in made)
        offset = offset if bias else None
        if fused:
            loss = fused_cross_entropy.summed_cross_entropy(hidden, weight, offset, targets)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="sum")
        (loss * 0.37).backward()
        found.append([loss, *(t.grad for t in (hidden, weight, offset) if t is not None)])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_computes_the_loss_gives_the_plain_gradients(monkeypatch, layout, tied):
    monkeypatch.setattr(fused_cross_entropy, "CHUNK_ELEMENTS", 64 * 64)
    model = model_of("tied embeddings" if tied else "llama", SEGMENTS)
    inputs = layout(rows(), 0).inputs
    wanted = sft_loss(model, **inputs)
    expected = gradients(model, wanted)
    found = fused_sft_loss(model, **inputs)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert "forward" not in vars(model.lm_head), "the head is itself again"


def test_the_fused_loss_with_frozen_weights_without_gradients_and_of_nothing(monkeypatch):
    model = model_of("llama", SEGMENTS)
    inputs = packed(rows(), 0).inputs
    model.lm_head.requires_grad_(False)
    expected = gradients(model, sft_loss(model, **inputs))
    for name, gradient in gradients(model, fused_sft_loss(model, **inputs)).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    with torch.no_grad():
        torch.testing.assert_close(fused_sft_loss(model, **inputs), sft_loss(model, **inputs))
    empty = fused_sft_loss(model, **packed([], 0).inputs)
    assert empty.item() == 0 and not any(gradient.any() for gradient in gradients(model, empty).values())


def test_chunks_of_16_bit_weights_are_added_up_in_float32(monkeypatch):
    monkeypatch.undo()  # torch.Tensor.float is itself again
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=random).bfloat16() for shape in ((4096, 16), (32, 16)))
    targets = torch.randint(0, 32, (4096,), generator=random)

    def error(elements: int) -> float:
        monkeypatch.setattr(fused_cross_entropy, "CHUNK_ELEMENTS", elements)
        mine = weight.clone().requires_grad_()
        fused_cross_entropy.summed_cross_entropy(hidden, mine, None, targets).backward()
        exact = weight.double().requires_grad_()
        F.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
        return float((mine.grad - exact.grad).norm() / exact.grad.norm())

    # 64 chunks lose no more than one
    assert error(32 * 64) < 2 * error(32 * 4096)


@pytest.mark.parametrize("denominator", [1000, 3001, 12345])
def test_the_windows_scale_is_not_rounded_to_16_bits(monkeypatch, denominator):
    monkeypatch.undo()
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=random).bfloat16() for shape in ((5000, 16), (32, 16))]
    targets = torch.randint(0, 32, (5000,), generator=random)
    found = []
    for factor in (1.0, 1 / denominator):
        hidden, weight = (t.clone().requires_grad_() for t in made)
        (fused_cross_entropy.summed_cross_entropy(hidden, weight, None, targets) * factor).backward()
        found.append([hidden.grad.double(), weight.grad.double()])
    for whole, part in zip(*found, strict=True):
        # each element is rounded by itself, to either side: their sum of squares keeps the scale
        assert abs(float(part.norm() / whole.norm()) * denominator - 1) < 3e-4


def test_an_evaluation_computes_no_gradient(monkeypatch):
    model, products = model_of("llama", SEGMENTS), []
    real = torch.Tensor.scatter_add_
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda self, *a: products.append(1) or real(self, *a))
    with torch.no_grad():
        fused_sft_loss(model, **packed(rows(), 0).inputs)
    assert not products
    fused_sft_loss(model, **packed(rows(), 0).inputs)
    assert products


def test_a_trained_bias_alone_gets_its_gradient():
    random = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((9, 4), (7, 4), (7,))
    )
    targets = torch.randint(0, 7, (9,), generator=random)
    mine, wanted = (bias.clone().requires_grad_() for _ in range(2))
    fused_cross_entropy.summed_cross_entropy(hidden, weight, mine, targets).backward()
    F.cross_entropy(F.linear(hidden, weight, wanted), targets, reduction="sum").backward()
    torch.testing.assert_close(mine.grad, wanted.grad)
