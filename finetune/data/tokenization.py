"""Rows to token ids, each with a bit that says whether it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.assistant_turns import Rendered, Turn, render_turns
from finetune.data.chat_template import ChatFormat, UnusableRow
from finetune.data.formats import SourceRow
from finetune.data.parallel import map_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One sample: `input_ids` int32 and `trained` bool, both (tokens,). Turn counts are those of its trained turns.

    `turns` have at least one trained token, `ends` of them have their end-of-turn token trained.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    truncated: bool = False
    turns: int = 0
    ends: int = 0


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be trained on, and why."""

    where: str
    reason: str


def encode_chat(
    chat: ChatFormat, rows: Iterable[SourceRow], loss_on: str, max_length: int
) -> Iterator[Encoded | Dropped]:
    """One sample per conversation, in order, truncated on the right to `max_length` tokens.

    `loss_on`: "assistant" trains every assistant turn, "completion" the last one, "all" every token but the first.
    """
    return map_batches(partial(chat_batch, chat, loss_on, max_length), rows)


def chat_batch(chat: ChatFormat, loss_on: str, max_length: int, batch: Sequence[SourceRow]) -> list[Encoded | Dropped]:
    """One result per conversation of a batch."""
    rendered = [_render(chat, row, loss_on) for row in batch]
    good = [entry for entry in rendered if isinstance(entry, Rendered)]
    ids: list[list[int]] = []
    offsets: list[list[tuple[int, int]] | None] = []
    if good:
        # the template has written every special token already: adding them again would double the BOS
        tokens = chat.tokenizer(
            [entry.text for entry in good],
            add_special_tokens=False,
            return_offsets_mapping=loss_on != "all",
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids, offsets = tokens["input_ids"], tokens.get("offset_mapping", [None] * len(good))
    encodings = zip(ids, offsets, strict=True)
    return [
        entry if isinstance(entry, Dropped) else _chat_sample(row.where, entry, *next(encodings), max_length)
        for row, entry in zip(batch, rendered, strict=True)
    ]


def _render(chat: ChatFormat, row: SourceRow, loss_on: str) -> Rendered | Dropped:
    messages = row.messages
    assert messages is not None, "a source of conversations has no rows of plain text"
    if loss_on != "all" and not any(message["role"] == "assistant" for message in messages):
        return Dropped(row.where, "it has no assistant turn")
    try:
        rendered = render_turns(chat, messages, row.tools)
    except UnusableRow as error:
        # with every token trained, a template that changes plain contents beyond recognition does no harm
        if loss_on == "all" and not row.tools and all(set(message) == {"role", "content"} for message in messages):
            try:
                return Rendered(chat.render(messages, row.tools), ())
            except UnusableRow as refused:
                return Dropped(row.where, str(refused))
        return Dropped(row.where, str(error))
    return Rendered(rendered.text, rendered.turns[-1:]) if loss_on == "completion" else rendered


def _chat_sample(
    where: str, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]] | None, max_length: int
) -> Encoded | Dropped:
    input_ids = np.asarray(ids[:max_length], np.int32)
    truncated = len(ids) > max_length
    trained = np.ones(len(input_ids), np.bool_)
    turns = ends = 0
    if offsets is not None:
        trained[:] = False
        places = np.asarray(offsets[:max_length], np.int64).reshape(-1, 2)
        for turn in rendered.turns:
            first, last = _token_range(places, turn, rendered.text)
            trained[first:last] = True
            turns += last > first
            ends += bool(turn.ends and last > first and places[last - 1, 1] >= turn.end)
    trained[:1] = False
    if not trained.any():
        reason = "truncation leaves no trained token" if truncated else "it has no trained token"
        return Dropped(where, reason)
    return Encoded(input_ids, trained, truncated, turns, ends)


def _token_range(places: np.ndarray, turn: Turn, text: str) -> tuple[int, int]:
    """Tokens [first, last) that cover characters of the turn; `places` (tokens, 2) are their character offsets."""
    covers = np.flatnonzero((places[:, 0] < turn.end) & (places[:, 1] > turn.start) & (places[:, 0] < places[:, 1]))
    # A header token may swallow white space that the content begins with (rstrip): it stays a header token. White
    # space before a word is another matter: " Hello" is one token, and the model writes all of it.
    while len(covers) and (begin := places[covers[0], 0]) < turn.start and text[begin : turn.start].strip():
        covers = covers[1:]
    return (int(covers[0]), int(covers[-1]) + 1) if len(covers) else (0, 0)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[SourceRow], block_tokens: int
) -> Iterator[Encoded | Dropped]:
    """Documents, each ended by eos, joined in order and cut into samples of `block_tokens`; all but the first trained.

    The last sample may be shorter; one of a single token is left out, for it trains nothing. Documents begin with what
    the tokenizer puts there (BOS, or nothing). A document without characters other than white space is dropped.
    """
    return join_blocks(map_batches(partial(document_batch, tokenizer, text_prefix(tokenizer)), rows), block_tokens)


def join_blocks(documents: Iterable[np.ndarray | Dropped], block_tokens: int) -> Iterator[Encoded | Dropped]:
    """Token ids of documents, joined and cut into blocks."""
    held: list[np.ndarray] = []
    held_tokens = 0
    for document in documents:
        if isinstance(document, Dropped):
            yield document
            continue
        held.append(document)
        held_tokens += len(document)
        if held_tokens >= block_tokens:
            joined = np.concatenate(held)
            cut = held_tokens - held_tokens % block_tokens
            yield from (_block(joined[i : i + block_tokens]) for i in range(0, cut, block_tokens))
            held, held_tokens = [joined[cut:]], held_tokens - cut
    if held_tokens >= 2:
        yield _block(np.concatenate(held))


def document_batch(
    tokenizer: PreTrainedTokenizerBase, prefix: list[int], batch: Sequence[SourceRow]
) -> list[np.ndarray | Dropped]:
    """The token ids of each document of a batch, from `prefix` to eos."""
    texts = [row.text or "" for row in batch]
    full = [text for text in texts if text.strip()]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    plain = iter(tokenizer(full, verbose=False, **options)["input_ids"] if full else ())
    result: list[np.ndarray | Dropped] = []
    for row, text in zip(batch, texts, strict=True):
        if not text.strip():
            result.append(Dropped(row.where, "its text is empty"))
            continue
        ids = next(plain)
        # a document that spells out its own first or last special token does not get a second one
        begin = [] if ids[: len(prefix)] == prefix else prefix
        end = [] if ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        result.append(np.asarray([*begin, *ids, *end], np.int32))
    return result


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text (BOS, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    return full[: starts[0]] if starts else []


def _block(input_ids: np.ndarray) -> Encoded:
    trained = np.ones(len(input_ids), np.bool_)
    trained[0] = False
    return Encoded(input_ids, trained)
