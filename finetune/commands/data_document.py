"""The document of `finetune data`: figures of the token rows, samples, and what would make training wrong."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune.data.prepare import tokenise
from finetune.data.token_cache import TokenRows
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.model.facts import read_facts
from finetune.model.tokenizer import load_tokenizer
from finetune.recipe.load import LoadedRecipe
from finetune.training.job import check_rows

_STREAMED_ROWS = 2000
_MANY_DUPLICATES, _MANY_TRUNCATED, _FEW_ENDS, _FEW_TRAINED = 0.05, 0.1, 0.9, 0.02


def examine(loaded: LoadedRecipe, samples: int) -> dict[str, Any]:
    """The report's content: `ok`, `problems`, `warnings`, `notes` (sentences), `recipe`, `loss_on`, `max_length`,
    `sources`, `train` and `evaluation` (figures, or None; see `figures`), `samples` and `cache`.

    A sample is `row`, `tokens`, `trained` (counts) and `pieces`, [text, whether it is trained, whether it is a special
    token] in order. Raises UserError where the data cannot be read at all.
    """
    facts, tokenizer = read_facts(loaded), load_tokenizer(loaded)
    said: list[str] = []
    if loaded.recipe.data.streaming:
        loaded = loaded.sample(_STREAMED_ROWS)
        said.append(f"data: the stream is read as a sample of its first {_STREAMED_ROWS:,} rows")
    prepared, problems = tokenise(loaded, tokenizer, said.append)
    notes = [line.removeprefix("data: ") for line in said if " is read as " in line]
    document: dict[str, Any] = {
        "ok": False,
        "problems": problems,
        "warnings": [],
        "notes": notes,
        "recipe": str(loaded.path),
        "loss_on": loaded.recipe.data.loss_on,
        "max_length": loaded.recipe.data.max_length,
        "sources": [],
        "train": None,
        "evaluation": None,
        "samples": [],
        "cache": None,
    }
    if prepared is None:
        return document
    try:
        check_rows(loaded, one_process(), facts, tokenizer, prepared)
    except UserError as error:
        problems += error.messages
    summary, bos = prepared.summary, tokenizer.bos_token_id
    train, train_keys, last_tokens = figures(summary, prepared.train, bos)
    document |= {"sources": summary["sources"], "train": train, "cache": summary["cache_folder"]}
    if prepared.evaluation is not None:
        document["evaluation"], keys, _ = figures(summary["evaluation"], prepared.evaluation, bos)
        known = set(train_keys)
        document["evaluation"]["also_in_train"] = sum(key in known for key in keys)
    document["samples"] = [_sample(tokenizer, prepared.train, index) for index in _spread(len(prepared.train), samples)]
    problems += _double_bos(loaded, tokenizer, document)
    document["warnings"] = list(_warnings(document, _unknown_ends(loaded, tokenizer, last_tokens)))
    document["ok"] = not problems
    return document


def figures(
    summary: Mapping[str, Any], rows: TokenRows, bos: int | None
) -> tuple[dict[str, Any], list[bytes], dict[int, int]]:
    """Figures of one split: counts from its summary, `duplicates`, `double_bos`, `only_ends` (rows), `lengths`
    (tokens).

    Also the content keys of its rows, and how often each token id is the last trained one of a row.
    """
    keys: list[bytes] = []
    double_bos = 0
    last_tokens: dict[int, int] = {}
    for index in rows.distinct():
        row = rows.row(index)
        keys.append(hashlib.sha256(row.input_ids.tobytes()).digest()[:16])
        double_bos += bos is not None and len(row.input_ids) > 1 and row.input_ids[0] == bos == row.input_ids[1]
        last = int(row.labels[np.flatnonzero(row.labels != -100)[-1]])
        last_tokens[last] = last_tokens.get(last, 0) + 1
    counted = ("source_rows", "rows", "tokens", "trained_tokens", "turns", "ends", "truncated", "dropped", "reasons")
    result = {name: summary[name] for name in counted}
    result |= {
        "duplicates": len(keys) - len(set(keys)),
        "double_bos": int(double_bos),
        "only_ends": int((rows.trained <= 1).sum()),
    }
    return result | {"lengths": _lengths(rows.lengths)}, keys, last_tokens


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """`min`, `median`, `p90`, `max` (tokens) and `histogram`, [from, to, rows] with `to` included."""
    width = _round_width(int(lengths.max()) / 10)
    starts = range(1, int(lengths.max()) + 1, width)
    counts = np.bincount((lengths - 1) // width, minlength=len(starts))
    return {
        "min": int(lengths.min()),
        "median": int(np.median(lengths)),
        "p90": int(np.percentile(lengths, 90)),
        "max": int(lengths.max()),
        "histogram": [
            [start, min(start + width - 1, int(lengths.max())), int(count)]
            for start, count in zip(starts, counts, strict=True)
        ],
    }


def _round_width(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= width:
                return factor * step
        step *= 10


def _spread(rows: int, samples: int) -> list[int]:
    return sorted({rows * i // samples for i in range(samples)}) if samples else []


def _sample(tokenizer: PreTrainedTokenizerBase, rows: TokenRows, index: int) -> dict[str, Any]:
    row = rows.row(index)
    trained = row.labels != -100
    special = np.isin(row.input_ids, list(tokenizer.added_tokens_decoder))
    edges = np.flatnonzero((trained[1:] != trained[:-1]) | (special[1:] != special[:-1])) + 1
    pieces, done = [], ""
    for start, end in zip([0, *edges], [*edges, len(trained)], strict=True):
        # decoded from the row's beginning: some decoders drop the white space a text begins with
        text = tokenizer.decode(row.input_ids[:end], clean_up_tokenization_spaces=False)
        shared = text if text.startswith(done) else tokenizer.decode(row.input_ids[start:end])
        pieces.append([text[len(done) :] if shared is text else shared, bool(trained[start]), bool(special[start])])
        done = text
    return {"row": int(index), "tokens": len(trained), "trained": int(trained.sum()), "pieces": pieces}


def _double_bos(loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, document: Mapping[str, Any]) -> list[str]:
    rows = document["train"]["double_bos"]
    if not rows:
        return []
    return [
        f"{loaded.location('model.name_or_path')}: {rows} of {document['train']['rows']} rows begin with two"
        f" {tokenizer.bos_token}: the template writes it twice, or the data hold it already. Take it out of"
        " the data or of the chat template."
    ]


def _unknown_ends(loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, last_tokens: dict[int, int]) -> str | None:
    """The token that ends most rows, when neither tokenizer nor model would stop at it."""
    section = loaded.recipe.model
    stops = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError, ValueError):
        config = GenerationConfig.from_pretrained(section.name_or_path, revision=section.revision)
        stops |= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    commonest = max(last_tokens, key=lambda token: last_tokens[token])
    if commonest in stops or commonest not in tokenizer.added_tokens_decoder:
        return None
    return tokenizer.convert_ids_to_tokens(commonest)


def _warnings(document: Mapping[str, Any], unknown_end: str | None) -> Iterator[str]:
    train, evaluation = document["train"], document["evaluation"]
    rows = sum(source["rows"] for source in document["sources"])
    if unknown_end:
        yield (
            f"turns end with {unknown_end}, but neither the tokenizer nor the generation config stops there: add it to"
            " eos_token_id"
        )
    if train["turns"] and train["ends"] < _FEW_ENDS * train["turns"]:
        yield f"only {train['ends']:,} of {train['turns']:,} turns have their end trained: raise data.max_length?"
    if train["truncated"] > _MANY_TRUNCATED * rows:
        yield f"{train['truncated']:,} of {rows:,} rows are cut at data.max_length {document['max_length']:,}"
    if train["duplicates"] > _MANY_DUPLICATES * rows:
        yield f"{train['duplicates']:,} of {rows:,} rows repeat another row"
    if train["only_ends"]:
        yield f"{train['only_ends']:,} rows train a single token: their answers are empty or cut away"
    if train["trained_tokens"] < _FEW_TRAINED * train["tokens"]:
        yield f"only {train['trained_tokens'] / train['tokens']:.1%} of the tokens are trained"
    if evaluation and evaluation["also_in_train"]:
        yield f"{evaluation['also_in_train']:,} evaluation rows are training rows too: the held-out loss is too good"
