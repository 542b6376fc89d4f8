"""What the data tests share: a small byte-level BPE tokenizer, chat templates of several families, recipes on disk."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune.recipe.load import load_recipe

SPECIAL = (
    "<s> </s> <pad> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|user|>"
    " <|assistant|> <|system|> <|end|> [INST] [/INST] <start_of_turn> <end_of_turn> <bos>"
).split()
_TEXT = (
    "The quick brown fox jumps over the lazy dog. Hello there! How are you today? I am fine, thank you. assistant user "
    "system model think What is two plus two? It is four. \n\nBye.\n"
)

CHATML = r"""{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_GENERATION = r"""{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}
{{- m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
LLAMA3 = r"""{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'
+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{
'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
ZEPHYR = r"""{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"""
MISTRAL = r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}"""
GEMMA = r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"""
# As Qwen3: the thinking of earlier turns is dropped, the last turn's is laid out anew, and an empty one is written.
QWEN3 = r"""{%- set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}
{%- set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m['content'] %}{% if m['role'] != 'assistant' %}
{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% else %}{% set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > last.user %}{{ '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n'
+ content.lstrip('\n') + '<|im_end|>\n' }}{% else %}
{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}"""
# As Command-R7B: two special tokens close a turn, and the second one is eos.
TWO_ENDS = r"""{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] + '<|end|>' + eos_token }}{% endfor %}"""
# As GLM-4: nothing closes a turn but the next one's header.
OPEN_ENDED = r"""{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"""
# No special token anywhere near a turn's end.
PLAIN = r"""{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"""


def make_tokenizer(
    template: str | None = CHATML,
    bos=None,
    eos="</s>",
    pad="<pad>",
    add_bos=False,
    rstrip=(),
    special=SPECIAL,
    added=(),
):
    """A byte-level BPE of some 400 entries. `add_bos` makes it put BOS before plain text, as Llama's does; tokens in
    `rstrip` swallow the white space after them, as Phi-3's do; `added` are known words, but not special."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([_TEXT] * 8, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, rstrip=text in rstrip) for text in special])
    bpe.add_tokens([AddedToken(text, special=False) for text in added])
    if add_bos:
        number = bpe.token_to_id(bos)
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def write_jsonl(path: Path, rows: list) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_row(*contents: str, system: str | None = None) -> dict:
    """A row of alternating user and assistant contents."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": messages}


def recipe_of(folder: Path, train: Path | list[Path], *overrides: str, extra: str = ""):
    """A recipe over local files, loaded by the real reader; `extra` are more YAML lines of the data section."""
    (folder / "model").mkdir(exist_ok=True)
    paths = train if isinstance(train, list) else [train]
    sources = "".join(f"    - path: {path}\n" for path in paths)
    text = f"model: {{name_or_path: ./model}}\ndata:\n  train:\n{sources}{extra}output_dir: {folder}/out\n"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def trained_texts(tokenizer, row) -> list[str]:
    """The decoded text of each run of trained tokens in a row."""
    runs, current = [], []
    for token, label in [*zip(row.input_ids.tolist(), row.labels.tolist(), strict=True), (None, -100)]:
        if label != -100:
            assert label == token
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            current = []
    return runs
