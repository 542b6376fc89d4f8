"""The job that all contestants train: a random Llama with a real vocabulary, and ragged chats."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 32_000
MODELS = {  # sizes of a Llama's config
    "small": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2),
    "25m": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8),
}
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
MAX_LENGTH = 1024
WORDS = "the quick brown fox jumps over a lazy dog while somebody counts to seven and thinks of nothing at all".split()


@dataclass(frozen=True)
class SpeedJob:
    """What every contestant trains. `folder` holds base/, train.jsonl, held_out.jsonl and recipe.yaml."""

    folder: str
    precision: str  # no | bf16
    window_rows: int
    micro_batch_rows: int
    threads: int
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-3
    adam_epsilon: float = 1e-6
    seed: int = 0

    def write(self) -> Path:
        """As JSON in its folder, for the contestants' processes."""
        file = Path(self.folder) / f"job-{self.precision}.json"
        file.write_text(json.dumps(vars(self)), encoding="utf-8")
        return file


def make_job(folder: Path, model: str, rows: int, held_out: int, longest: int, seed: int) -> None:
    """Model, tokenizer, chats and recipe in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.data import make_tokenizer

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **MODELS[model],
        **HEADS,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, count, offset in (("train", rows, 0), ("held_out", held_out, 1)):
        lines = (json.dumps(chat) for chat in chats(tokenizer, count, longest, seed + offset))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")


RECIPE = """\
model: {{name_or_path: {folder}/base}}
data:
  train: [{{path: {folder}/train.jsonl}}]
  eval: [{{path: {folder}/held_out.jsonl}}]
  max_length: 1024
output_dir: {folder}/run
"""


def chats(tokenizer, count: int, longest: int, seed: int) -> list[dict]:
    """Chats of one to four turns each way; the tokens of a chat are log-uniform from about 10 to `longest`."""
    choose = random.Random(seed)
    per_word = len(tokenizer(" ".join(WORDS)).input_ids) / len(WORDS)
    found = []
    for _ in range(count):
        tokens = np.exp(choose.uniform(np.log(12), np.log(longest)))
        turns = 2 * min(4, 1 + int(tokens // 200))
        words = max(1, int((tokens - 6 * turns) / per_word / turns))
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": " ".join(choose.choices(WORDS, k=words))}
            for n in range(turns)
        ]
        found.append({"messages": messages})
    return found
