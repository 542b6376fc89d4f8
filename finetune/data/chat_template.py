"""A tokenizer's chat template, prepared so that a conversation renders the same way on every day."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates that print today's date would give other tokens on another day: every rendering sees this one.
_TEMPLATE_DATE = datetime(2024, 7, 26)
# Prompt and completion unchanged, for a tokenizer without a chat template.
_PAIR_TEMPLATE = (
    "{{ %r }}{%% for m in messages %%}{{ m['content'] }}{%% if m['role'] == 'assistant' %%}{{ eos_token }}{%% endif %%}"
    "{%% endfor %%}"
)


class UnusableRow(Exception):
    """A conversation that cannot become a training row, with the reason as text. The row counts as dropped."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template and what is known about its turns.

    `template` is the Jinja text; `end_patterns` find an end-of-turn token in the text after a turn, best first;
    `header` is what the template writes to ask for an answer (its generation prompt), empty where it writes nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    end_patterns: tuple[re.Pattern[str], ...]
    header: str

    def render(self, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> str:
        """The conversation as text. Raises NotLocated when the template refuses it (its own words)."""
        return _render(self.tokenizer, self.template, messages, tools)


def chat_format(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> ChatFormat:
    """The chat format of a Hugging Face tokenizer: its own chat template, or `template`.

    Raises ValueError (from transformers) when there is none.
    """
    special: set[str] = set()
    added: set[str] = set()
    for token in tokenizer.added_tokens_decoder.values():
        (special if token.special else added).add(token.content)
    if tokenizer.eos_token:
        special.add(tokenizer.eos_token)
    # A beginning-of-text token after a turn opens the next one; it ends nothing unless it doubles as eos.
    if tokenizer.bos_token != tokenizer.eos_token:
        special.discard(tokenizer.bos_token)
    # Some vocabularies list <|im_end|> as an ordinary added token: looked for only where no special one stands.
    patterns = tuple(
        re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
        for texts in (special, {text for text in added if text.strip()})
        if texts
    )
    fixed = _with_fixed_date(template or tokenizer.get_chat_template())
    return ChatFormat(tokenizer, fixed, patterns, _header(tokenizer, fixed))


def pair_format(tokenizer: PreTrainedTokenizerBase, prefix: str) -> ChatFormat:
    """Prompt and completion without a chat template: `prefix` (BOS, or nothing), prompt, completion, eos."""
    return chat_format(tokenizer, _PAIR_TEMPLATE % prefix)


def missing_end(chat: ChatFormat) -> str | None:
    """The tag that a template writes after an answer although the tokenizer does not have it as one token, or None.

    A model trained on such text could never stop: the tag would be a handful of ordinary tokens.
    """
    answer = "\U000f0000"
    try:
        text = chat.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
    except UnusableRow:
        return None
    after = text.rpartition(answer)[2]
    if any(pattern.search(after) for pattern in chat.end_patterns):
        return None
    tag = re.match(r"\s*(<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<[/a-z_]{1,24}>)", after)
    if tag and len(chat.tokenizer(tag[1], add_special_tokens=False)["input_ids"]) > 1:
        return tag[1]
    return None


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[dict],
    tools: Sequence[dict] | None = None,
    ask: bool = False,
) -> str:
    options = {"tools": list(tools) if tools else None, "chat_template": template, "add_generation_prompt": ask}
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UnusableRow(f"the chat template refuses it: {' '.join(str(error).split())[:160]}") from error


def _header(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    question = [{"role": "user", "content": "a"}]
    try:
        plain = _render(tokenizer, template, question)
        asked = _render(tokenizer, template, question, ask=True)
    except UnusableRow:
        return ""
    # Phi-3's closes what it does not leave open with eos
    plain = plain if asked.startswith(plain) else plain.removesuffix(tokenizer.eos_token or "")
    header = asked[len(plain) :] if asked.startswith(plain) else ""
    return header if header.strip() else ""


def _with_fixed_date(template: str) -> str:
    """The template with `strftime_now` answering for one fixed date, so that a row has the same tokens every day."""
    if "strftime_now" not in template:
        return template
    formats = set(re.findall(r"strftime_now\(\s*[\"']([^\"']+)[\"']", template)) | {"%d %b %Y"}
    dates = ", ".join(f"{form!r}: {_TEMPLATE_DATE.strftime(form)!r}" for form in sorted(formats))
    default = _TEMPLATE_DATE.strftime("%Y-%m-%d")
    macro = "{%- macro strftime_now(format) -%}{{- {DATES}.get(format, DEFAULT) -}}{%- endmacro -%}"
    return macro.replace("DEFAULT", repr(default)).replace("DATES", dates) + template
