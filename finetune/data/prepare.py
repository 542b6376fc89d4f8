"""The data section of a recipe made into token rows: sources opened, rows held out, tokenised once, cached."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from finetune.batching.windows import row_order
from finetune.data.chat_template import ChatFormat
from finetune.data.checks import chat_formats, count_problems, describe
from finetune.data.formats import SourceRow
from finetune.data.sources import Source, first_rows, open_sources
from finetune.data.token_cache import RowWriter, TokenRows, get_or_build, read_summary
from finetune.data.tokenization import Dropped, Encoded, encode_chat, encode_text
from finetune.errors import UserError
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2  # part of every cache key: raise it when the same rows become other tokens
_PROGRESS_AFTER_SECONDS = 3
_HALVES = 1 << 40  # keeps the choice of a fractional weight apart from the orders of the epochs
_Rows = Iterator[tuple[int, SourceRow]]  # each with its source's index
_Samples = Iterator[tuple[int, Encoded | Dropped]]
TrainRows = TypeVar("TrainRows")  # TokenRows, or StreamRows under data.streaming


@dataclass(frozen=True)
class PreparedData(Generic[TrainRows]):
    """Token rows to train on and to evaluate on (None without data.eval or data.eval_fraction), and their figures.

    `summary` counts the training rows: `source_rows` (read), `dropped` (of them), `rows` (samples, after weights),
    `truncated`, `tokens`, `trained_tokens`, `turns`, `ends` (trained turns, and those whose end-of-turn token is
    trained), `reasons` (of dropped rows, each with a count and an example), `sources` (name, format, rows, weight);
    the same for evaluation rows under `evaluation` (or None); `max_token_id` over both; `cache`: "new" or "reused";
    `cache_folder`.
    """

    train: TrainRows
    evaluation: TokenRows | None
    summary: dict[str, Any]


def prepare(
    loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> PreparedData[TokenRows]:
    """Tokenise the recipe's data, or open what an earlier run with the same content left in the cache.

    Every process may call it at once, with or without a process group: the first of a node tokenises under a file
    lock, the others wait. `say` takes one line for people. Raises UserError for wrong rows, sources, templates and
    settings, with the data file's line or the recipe's.
    """
    prepared, problems = tokenise(loaded, tokenizer, say)
    if problems or prepared is None:
        raise UserError(problems)
    return prepared


def tokenise(
    loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[PreparedData[TokenRows] | None, list[str]]:
    """`prepare` that returns the problems instead of raising them: (the data, the problems).

    The data are None where no row came out. Raises UserError for what cannot be read at all.
    """
    train, evaluation = open_sources(loaded, "train"), open_sources(loaded, "eval")
    formats = chat_formats(loaded, tokenizer, [*train, *evaluation])
    key = _cache_key(loaded, tokenizer, train, evaluation)
    folder, reused = get_or_build(key, _is_good, partial(_build, loaded, tokenizer, formats, train, evaluation), say)
    stored = read_summary(folder)
    assert stored is not None
    problems = count_problems(loaded, stored)
    summary = {
        **stored["train"],
        "evaluation": stored["evaluation"],
        "max_token_id": stored["max_token_id"],
        "cache": "reused" if reused else "new",
        "cache_folder": str(folder),
    }
    if not stored["train"]["rows"]:
        return None, problems
    weights = [source.weight for source in train]
    index = weighted_rows([source["rows"] for source in summary["sources"]], weights, loaded.recipe.training.seed)
    fingerprint = f"{key}-train" + ("" if index is None else f"-{hashlib.sha256(index.tobytes()).hexdigest()[:16]}")
    rows = TokenRows(folder / "train", fingerprint, index)
    weighted = zip(summary["sources"], weights, strict=True)
    summary["sources"] = [{**entry, "weight": weight} for entry, weight in weighted]
    summary |= {"rows": len(rows), "tokens": int(rows.lengths.sum()), "trained_tokens": int(rows.trained.sum())}
    held_out = None
    if stored["evaluation"] and stored["evaluation"]["rows"]:
        held_out = TokenRows(folder / "evaluation", f"{key}-evaluation")
    describe([*train, *evaluation], summary, formats, say)
    return PreparedData(rows, held_out, summary), problems


def weighted_rows(rows: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray | None:
    """Numbers of the stored rows that make up an epoch, sources in order; None when every weight is 1.

    A source of n rows and weight w gives floor(w) times all its rows and round((w - floor(w)) * n) more, chosen by
    `seed` and the same in every epoch; at least one row.
    """
    if all(weight == 1 for weight in weights):
        return None
    parts, first = [], 0
    for number, (count, weight) in enumerate(zip(rows, weights, strict=True)):
        whole = int(weight)
        more = round((weight - whole) * count)
        more = max(more, 1) if whole == 0 and count else more
        chosen = np.sort(row_order(count, seed, _HALVES + number)[:more])
        parts.append(first + np.concatenate([np.tile(np.arange(count), whole), chosen]).astype(np.int64))
        first += count
    return np.concatenate(parts)


def _cache_key(
    loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, train: Sequence[Source], evaluation: Sequence[Source]
) -> str:
    data = loaded.recipe.data
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # of the last call
            vocabulary.pop(name, None)
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    content = {
        "format": FORMAT_VERSION,
        "vocabulary": vocabulary,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "train": [source.identity for source in train],
        "eval": [source.identity for source in evaluation],
        "max_length": data.max_length,
        "loss_on": data.loss_on,
        "max_rows": data.max_rows,
        "held_out": [data.eval_fraction, loaded.recipe.training.seed] if data.eval_fraction else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def held_out_keys(keys: Iterable[bytes], fraction: float, seed: int) -> set[bytes]:
    """Content keys of the rows to hold out: about `fraction` of the rows, at least one, the same for the same seed.

    Contents are ordered by a seeded hash and taken whole, so copies of a row all fall on one side. Empty when fewer
    than two different rows exist.
    """
    counts = Counter(keys)
    order = sorted(counts, key=lambda key: hashlib.sha256(seed.to_bytes(8, "little") + key).digest())
    wanted = max(1, round(fraction * sum(counts.values())))
    chosen: set[bytes] = set()
    for key in order[:-1]:
        if wanted <= 0:
            break
        chosen.add(key)
        wanted -= counts[key]
    return chosen


def _build(
    loaded: LoadedRecipe,
    tokenizer: PreTrainedTokenizerBase,
    formats: dict[str, ChatFormat],
    train: Sequence[Source],
    evaluation: Sequence[Source],
    folder: Path,
) -> None:
    data = loaded.recipe.data
    held_out: set[bytes] = set()
    if data.eval_fraction:
        keys = (row.content_key() for _, row in first_rows(train, data.max_rows))
        held_out = held_out_keys(keys, data.eval_fraction, loaded.recipe.training.seed)
    encode = partial(_encode_sources, tokenizer, formats, data.loss_on, data.max_length)

    def side(held: bool) -> _Rows:
        rows = first_rows(train, data.max_rows)
        return ((i, row) for i, row in rows if (row.content_key() in held_out) == held) if held_out else rows

    summary: dict[str, Any] = {"train": _write(folder / "train", encode, train, side(held=False)), "evaluation": None}
    if held_out:
        summary["evaluation"] = _write(folder / "evaluation", encode, train, side(held=True))
    elif evaluation or data.eval_fraction:
        summary["evaluation"] = _write(folder / "evaluation", encode, evaluation, first_rows(evaluation, None))
    parts = [part for part in (summary["train"], summary["evaluation"]) if part]
    summary["max_token_id"] = max(part.pop("max_token_id") for part in parts)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _encode_sources(
    tokenizer: PreTrainedTokenizerBase,
    formats: dict[str, ChatFormat],
    loss_on: str,
    max_length: int,
    sources: Sequence[Source],
    rows: _Rows,
) -> _Samples:
    """Samples of all sources in order, with their source's index; a block of text never holds documents of two."""
    for index, group in groupby(rows, key=lambda entry: entry[0]):
        source_rows: Iterator[SourceRow] = (row for _, row in group)
        kind = sources[index].kind
        if kind == "text":
            samples = encode_text(tokenizer, source_rows, max_length)
        else:
            samples = encode_chat(formats[kind], source_rows, loss_on, max_length)
        yield from ((index, sample) for sample in samples)


def _write(
    folder: Path,
    encode: Callable[[Sequence[Source], _Rows], _Samples],
    sources: Sequence[Source],
    rows: _Rows,
) -> dict[str, Any]:
    writer = RowWriter(folder)
    counts = Counter(source_rows=0, truncated=0, dropped=0, turns=0, ends=0)
    reasons: dict[str, dict] = {}
    of_source: Counter[int] = Counter()

    def counted() -> _Rows:
        name = f"tokenising {folder.name}"
        for entry in tqdm(rows, desc=name, unit=" rows", delay=_PROGRESS_AFTER_SECONDS, mininterval=1):
            counts["source_rows"] += 1
            yield entry

    for index, sample in encode(sources, counted()):
        if isinstance(sample, Dropped):
            counts["dropped"] += 1
            reasons.setdefault(sample.reason, {"rows": 0, "example": sample.where})["rows"] += 1
            continue
        writer.add(sample.input_ids, sample.trained)
        of_source[index] += 1
        counts.update(truncated=int(sample.truncated), turns=sample.turns, ends=sample.ends)
    writer.close()
    return {
        "rows": writer.rows,
        "tokens": writer.tokens,
        "trained_tokens": writer.trained_tokens,
        **counts,
        "reasons": reasons,
        "sources": [
            {"name": source.name, "format": source.shape.format, "rows": of_source[i]}
            for i, source in enumerate(sources)
        ],
        "max_token_id": writer.max_token_id,
    }


def _is_good(folder: Path) -> bool:
    summary = read_summary(folder)
    if summary is None:
        return False
    try:
        for name in ("train", "evaluation"):
            if summary[name] and summary[name]["rows"]:
                TokenRows(folder / name, "")
    except (OSError, ValueError, KeyError):
        return False
    return True
