#!/usr/bin/env python3
"""Ask a model the held-out questions and count the answers that are the right call.

    python -m scripts.quickstart.call_accuracy MODEL [--chats recipes/quickstart/data/heldout_calls.jsonl] [--show 3]

MODEL is a model folder, a run's adapter folder or a hub id. An answer is right when it is JSON and holds exactly the
expected function name and arguments; their order does not matter. Greedy decoding: the same model gives the same count.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from scripts.quickstart.instructions import DEFAULT_OUTPUT
from tests.support.function_calls import is_right

ROWS = 20  # questions that are answered at the same time
MAX_NEW_TOKENS = 48  # the longest right answer has 40


def main() -> None:
    """Print the first questions with their answers, then how many of all answers are right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--chats", type=Path, default=DEFAULT_OUTPUT / "heldout_calls.jsonl")
    parser.add_argument("--show", type=int, default=3, help="so many questions are printed")
    parser.add_argument("--output", type=Path, help='a file for {"right": ..., "asked": ...}')
    arguments = parser.parse_args()
    chats = [json.loads(line)["messages"] for line in arguments.chats.read_text(encoding="utf-8").splitlines()]
    given = answers(arguments.model, [chat[0]["content"] for chat in chats])
    right = 0
    for number, (chat, answer) in enumerate(zip(chats, given, strict=True)):
        good = is_right(answer, chat[1]["content"])
        right += good
        if number < arguments.show:
            print(f"question:\n{textwrap.indent(chat[0]['content'], '    ')}")
            print(f"answer ({'right' if good else 'wrong'}):\n{textwrap.indent(answer, '    ')}\n")
    print(f"right answers to the held-out questions: {right} of {len(chats)}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"right": right, "asked": len(chats)}) + "\n", encoding="utf-8")


def answers(model: str, questions: list[str]) -> Iterator[str]:
    """The model's greedy answers, one per question. Rows are padded on the left, where the attention mask hides it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    from finetune.engine.libraries import prepare_libraries

    prepare_libraries()
    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()  # adapters included
    end = tokenizer.eos_token_id
    network.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=end, do_sample=False
    )
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    for start in range(0, len(questions), ROWS):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + ROWS]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        output = network.generate(**batch)
        for row in output[:, batch["input_ids"].shape[1] :]:
            yield tokenizer.decode(row, skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
