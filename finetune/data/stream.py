"""Training rows tokenised while training: an endless, deterministic sequence that every rank reads and slices.

The sequence is a pure function of sources, settings and seed. Each source is read over and over; within blocks of
BLOCK_ROWS its rows are permuted by (seed, source, pass, block), encoded, and the sources' samples are dealt out in
proportion to their weights. Row n of the stream is therefore the same on every rank and in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.batching.windows import row_order
from finetune.data.chat_template import ChatFormat
from finetune.data.checks import chat_formats
from finetune.data.formats import SourceRow
from finetune.data.parallel import BATCH_ROWS
from finetune.data.prepare import PreparedData, prepare
from finetune.data.sources import Source, open_sources
from finetune.data.token_cache import IGNORED, TokenRow, get_or_build
from finetune.data.tokenization import Dropped, Encoded, chat_batch, document_batch, join_blocks, text_prefix
from finetune.errors import UserError
from finetune.recipe.fields import DataSection
from finetune.recipe.load import LoadedRecipe
from finetune.report.text import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_ROWS = 4096  # rows that are shuffled together; they are in memory together too
_CHECKED_ROWS = 256
_KEPT_ROWS = 8192  # rows that can be asked for again without starting over
_ENOUGH_ROWS = 200  # from here on the share of dropped rows is held to the recipe


class StreamRows:
    """The training rows in training order, as far as they are asked for; `row(i)` is cheap when i grows.

    `lengths` holds max_length alone: how long rows are is known when they come. `fingerprint` names the content.
    """

    def __init__(
        self, samples: Callable[[], Iterator[Encoded]], max_length: int, fingerprint: str, kept_rows: int = _KEPT_ROWS
    ):
        self._start, self._samples = samples, samples()
        self._kept: dict[int, TokenRow] = {}
        self._next, self._kept_rows = 0, kept_rows
        self.lengths = np.array([max_length], np.int64)
        self.fingerprint = fingerprint

    def length(self, index: int) -> int:
        """Tokens of row `index`, which is read for it."""
        return len(self.row(index).input_ids)

    def row(self, index: int) -> TokenRow:
        """Row `index` of the stream. Raises UserError where the source cannot be read on."""
        if index < self._next and index not in self._kept:
            self._samples, self._next = self._start(), 0
            self._kept.clear()
        while self._next <= index:
            sample = next(self._samples)
            labels = np.where(sample.trained, sample.input_ids, np.int32(IGNORED))
            self._kept[self._next] = TokenRow(sample.input_ids, labels)
            self._kept.pop(self._next - self._kept_rows, None)
            self._next += 1
        return self._kept[index]


def open_stream(
    loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> PreparedData[StreamRows]:
    """`prepare` for data.streaming: evaluation rows are prepared as ever, training rows come while training.

    Local files are read once to their end and the first rows are tokenised, so that errors in them are found before any
    weight is read; a hub data set is checked by its first rows. `summary` has the figures of those first rows,
    `streaming` True, and the vocabulary's last id as `max_token_id`. Raises UserError.
    """
    section = loaded.recipe.data
    changed = loaded.recipe.model_copy(update={"data": section.model_copy(update={"max_rows": _CHECKED_ROWS})})
    checked = prepare(replace(loaded, recipe=changed), tokenizer, lambda line: None)
    sources = open_sources(loaded, "train")
    formats = chat_formats(loaded, tokenizer, sources)
    for source in sources:
        _read_through(source, say)
    samples = partial(mixed, tokenizer, formats, loaded, sources)
    summary = {**checked.summary, "streaming": True, "max_token_id": max(tokenizer.get_vocab().values())}
    say(f"data: {count(len(sources), 'source')} streamed, tokenised while training")
    accumulation, window = loaded.recipe.accumulation, loaded.recipe.training.global_batch_size
    largest = window * math.ceil(accumulation.largest if accumulation.schedule == "adaptive" else 1)
    # the rows of a window are asked for in any order
    rows = StreamRows(samples, section.max_length, f"{checked.train.fingerprint}-stream", max(_KEPT_ROWS, 2 * largest))
    return PreparedData(rows, checked.evaluation, summary)


def _read_through(source: Source, say: Callable[[str], None]) -> None:
    """Read a local source to its end once, on whichever rank comes first: a bad row is met before training."""
    if not source.local:
        return

    def read(folder: Path) -> None:
        rows = sum(1 for _ in source.read())
        (folder / "summary.json").write_text(f'{{"rows": {rows}}}', encoding="utf-8")

    get_or_build(f"checked-{source.key()}", lambda folder: (folder / "summary.json").exists(), read, say)


def mixed(
    tokenizer: PreTrainedTokenizerBase, formats: dict[str, ChatFormat], loaded: LoadedRecipe, sources: Sequence[Source]
) -> Iterator[Encoded]:
    """Samples of all sources, endless, in proportion to their weights: each time from the one most behind its share."""
    seed = loaded.recipe.training.seed
    streams = [_endless(tokenizer, formats, loaded, source, [seed, n]) for n, source in enumerate(sources)]
    weights = np.array([source.weight for source in sources])
    behind = np.zeros(len(sources))
    while True:
        behind += weights / weights.sum()
        chosen = int(np.argmax(behind))
        behind[chosen] -= 1
        yield next(streams[chosen])


def _endless(
    tokenizer: PreTrainedTokenizerBase,
    formats: dict[str, ChatFormat],
    loaded: LoadedRecipe,
    source: Source,
    seed: list[int],
) -> Iterator[Encoded]:
    data, passes, seen, dropped = loaded.recipe.data, 0, 0, 0
    example: Dropped | None = None
    while True:
        before = seen - dropped
        for sample in _encoded(tokenizer, formats, data, source, [*seed, passes]):
            seen += 1
            if not isinstance(sample, Dropped):
                yield sample
                continue
            dropped, example = dropped + 1, example or sample
            if seen >= _ENOUGH_ROWS and dropped > data.max_dropped_fraction * seen:
                break
        passes += 1
        if dropped > data.max_dropped_fraction * seen or seen - dropped == before:
            why = f": {example.reason} (first: {example.where})" if example else ""
            raise UserError(
                f"{source.setting}: {dropped} of the first {seen} rows of {source.name} cannot be trained on, at most "
                f"{data.max_dropped_fraction:.0%} may be dropped (data.max_dropped_fraction){why}."
            )


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    formats: dict[str, ChatFormat],
    data: DataSection,
    source: Source,
    seed: list[int],
) -> Iterator[Encoded | Dropped]:
    """One pass over a source. In this process: forking is not safe any more once a device is in use."""
    rows = _shuffled(source.read(), seed)
    batches = iter(lambda: list(islice(rows, BATCH_ROWS)), [])
    if source.kind == "text":
        prefix = text_prefix(tokenizer)
        documents = (document for batch in batches for document in document_batch(tokenizer, prefix, batch))
        return join_blocks(documents, data.max_length)
    encode = partial(chat_batch, formats[source.kind], data.loss_on, data.max_length)
    return (sample for batch in batches for sample in encode(batch))


def _shuffled(rows: Iterator[SourceRow], seed: list[int]) -> Iterator[SourceRow]:
    for number, block in enumerate(iter(lambda: list(islice(rows, BLOCK_ROWS)), [])):
        words = np.random.SeedSequence([*seed, number]).generate_state(1, np.uint64)
        yield from (block[i] for i in row_order(len(block), int(words[0]), 0))
