#!/usr/bin/env python3
"""Make the quick start's base model: a tokenizer, a small Llama, and a few minutes of pre-training on a CPU.

    python -m scripts.quickstart.tiny_model [--output runs/quickstart-base] [--launch accelerate_configs/cpu.yaml]
    [--seed 42]

The untrained model goes to OUTPUT-init, then this project's own trainer runs recipes/quickstart/pretrain.yaml on it;
the result lies in OUTPUT/model. Same seed, same machine, same model. Nothing is downloaded. A finished OUTPUT is kept;
an unfinished one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = REPOSITORY / "recipes" / "quickstart" / "data" / "python_docs.jsonl"
RECIPE = REPOSITORY / "recipes" / "quickstart" / "pretrain.yaml"

# Four tokens for four jobs. Padding that is also the end of text is how models are taught never to stop.
END_OF_TEXT, PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCABULARY_TOKENS = 4096
CONTEXT_TOKENS = 1024
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def main() -> int:
    """Build what is missing; return the trainer's exit status, 0 when the model is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-base"), help="the run's folder")
    parser.add_argument("--launch", type=Path, help="an accelerate_configs file; without it one plain process")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--untrained-only", action="store_true", help="stop after OUTPUT-init")
    arguments = parser.parse_args()
    output = arguments.output
    if _status(output) == "done":
        print(f"{output / 'model'} is there already; delete {output} to make it again")
        return 0
    untrained = output.with_name(output.name + "-init")
    _write_untrained(untrained, arguments.seed)
    if arguments.untrained_only:
        return 0
    return _pretrain(untrained, output, arguments.launch, arguments.seed)


def _status(run_folder: Path) -> str:
    try:
        return json.loads((run_folder / "run.json").read_text(encoding="utf-8")).get("status", "")
    except (FileNotFoundError, json.JSONDecodeError):
        return ""


def _texts() -> Iterator[str]:
    with TEXT.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer():
    """Return a fast byte-level BPE tokenizer with VOCABULARY_TOKENS entries and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_TOKENS,
            special_tokens=[END_OF_TEXT, PADDING, TURN_START, TURN_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any byte can be written, seen in training or not
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _write_untrained(folder: Path, seed: int) -> None:
    """Save a tokenizer and a randomly initialised Llama, small enough for two CPU cores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = ends  # a chat ends at its turn, a text at its end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens in the vocabulary")


def _pretrain(untrained: Path, output: Path, launch: Path | None, seed: int) -> int:
    command = [sys.executable, "-m", "finetune", "train", str(RECIPE)]
    command += ["--launch", str(launch)] if launch else []
    command += [f"model.name_or_path={untrained.resolve()}", f"output_dir={output.resolve()}", f"training.seed={seed}"]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]  # works in an uninstalled checkout too
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
