"""Models and data made on the spot: a config, random weights, a tokenizer trained on local text, ragged chat rows."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers

from tests.support.data import make_tokenizer, write_jsonl

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WORDS = "the quick brown fox jumps over a lazy dog while somebody counts to seven and thinks of nothing at all".split()


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
FAMILIES = {
    "llama": ("Llama", SMALL),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 8}),
    "mistral": ("Mistral", SMALL | {"head_dim": 8, "sliding_window": 32}),
    "gemma3": ("Gemma3", SMALL | {"head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", GPT2),
}


def tiny_model(folder: Path, family: str = "llama", vocabulary: int = 448, tie: bool = True, seed: int = 0) -> Path:
    """A loadable folder with a random-init model of some 30,000 parameters and its tokenizer."""
    torch.manual_seed(seed)
    name, sizes = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}LMHeadModel", None) or getattr(transformers, f"{name}ForCausalLM")
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= vocabulary
    config = config_class(
        vocab_size=vocabulary,
        tie_word_embeddings=tie,
        **{"max_position_embeddings": 256} | sizes,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_rows(count: int, seed: int = 0) -> list[dict]:
    """Chat rows of very different lengths."""
    choose = random.Random(seed)

    def sentence(longest: int) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(1, longest)))

    return [
        {"messages": [{"role": "user", "content": sentence(8)}, {"role": "assistant", "content": sentence(30)}]}
        for _ in range(count)
    ]


def chat_file(path: Path, count: int, seed: int = 0) -> Path:
    """`count` chat rows in a .jsonl file."""
    return write_jsonl(path, chat_rows(count, seed))


RECIPE = """\
model: {{name_or_path: {model}}}
data:
  train: [{{path: {data}}}]
  eval_fraction: 0.2
  max_length: 64
training:
  num_train_epochs: 1
  global_batch_size: 8
  per_device_train_batch_size: 2
  learning_rate: 1.0e-2
evaluation: {{eval_steps: 3}}
output_dir: {output}
"""


def small_recipe(folder: Path, rows: int = 50, **model) -> Path:
    """A folder with model, data and recipe.yaml; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(folder / "base", **model)
    chat_file(folder / "chat.jsonl", rows)
    text = RECIPE.format(model=folder / "base", data=folder / "chat.jsonl", output=folder / "run")
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"
