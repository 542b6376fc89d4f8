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

from tqdm import tqdm

from finetune.data.chat import ChatFormat, chat_format
from finetune.data.encode import Dropped, Encoded, encode_chat, encode_text
from finetune.data.sources import Source, SourceRow, first_rows, open_source
from finetune.data.store import RowWriter, TokenRows, get_or_build, read_summary
from finetune.errors import UserError
from finetune.recipe import Loaded

FORMAT_VERSION = 1  # part of every cache key: raise it when the same rows become other tokens
MAX_DROPPED_FRACTION = 0.1
_PROGRESS_AFTER_SECONDS = 3
_Rows = Iterator[tuple[int, SourceRow]]


@dataclass(frozen=True)
class PreparedData:
    """Token rows to train on and to evaluate on (None without data.eval or data.eval_fraction), and their figures.

    `summary` counts the training rows: `source_rows` (read), `dropped` (of them), `rows` (samples), `truncated`,
    `tokens`, `trained_tokens`, `turns`, `ends` (trained turns, and those whose end-of-turn token is trained), `reasons`
    (of dropped rows, each with a count and an example); the same for evaluation rows under `evaluation` (or None);
    `max_token_id` over both; `cache`: "new" or "reused"; `cache_folder`.
    """

    train: TokenRows
    evaluation: TokenRows | None
    summary: dict


def prepare(loaded: Loaded, tokenizer, say: Callable[[str], None]) -> PreparedData:
    """Tokenise the recipe's data, or open what an earlier run with the same content left in the cache.

    Every process may call it at once, with or without a process group: the first of a node tokenises under a file
    lock, the others wait. `say` takes one line for people. Raises UserError for rows, sources, templates and settings
    that the user can mend, with the data file's line or the recipe's.
    """
    data = loaded.recipe.data
    train = _open(loaded, "train", data.train)
    evaluation = _open(loaded, "eval", data.eval or [])
    chat = _check_tokenizer(loaded, tokenizer, [*train, *evaluation])
    key = _cache_key(loaded, tokenizer, train, evaluation)
    folder, reused = get_or_build(key, _is_good, partial(_build, loaded, tokenizer, chat, train, evaluation), say)
    summary = read_summary(folder)
    assert summary is not None
    _check_counts(loaded, summary)
    opened = {name: TokenRows(folder / name, f"{key}-{name}") for name in ("train", "evaluation") if summary[name]}
    summary = {
        **summary["train"],
        "evaluation": summary["evaluation"],
        "max_token_id": summary["max_token_id"],
        "cache": "reused" if reused else "new",
        "cache_folder": str(folder),
    }
    _describe(summary, say)
    return PreparedData(opened["train"], opened.get("evaluation"), summary)


def _open(loaded: Loaded, name: str, sections: Sequence) -> list[Source]:
    sources = []
    for i, section in enumerate(sections):
        setting = f"{loaded.where(f'data.{name}[{i}].path')}: data.{name}"
        sources.append(open_source(section.path, section.split, setting))
    return sources


def _check_tokenizer(loaded: Loaded, tokenizer, sources: Sequence[Source]) -> ChatFormat | None:
    """The chat format, if a source needs one. Raises UserError where tokenizer, sources and data.loss_on do not fit."""
    loss_on = loaded.recipe.data.loss_on
    model = f"{loaded.where('model.name_or_path')}: model.name_or_path"
    text = next((source for source in sources if source.kind == "text"), None)
    if text and loss_on != "all":
        raise UserError(
            f"{loaded.where('data.loss_on')}: data.loss_on is '{loss_on}', but {text.name} ({text.setting}) is plain "
            "text, which has no assistant turns. Use data.loss_on: all."
        )
    if text and tokenizer.eos_token_id is None:
        raise UserError(f"{model}: its tokenizer has no eos token, which has to end every document of {text.name}.")
    chat = next((source for source in sources if source.kind == "chat"), None)
    if not chat:
        return None
    if not tokenizer.chat_template:
        raise UserError(
            f"{model}: its tokenizer has no chat template, which the conversations of {chat.name} need. Use the "
            "instruction-tuned variant of the model, or a copy of it with a chat_template.jinja."
        )
    if loss_on != "all" and not tokenizer.is_fast:
        raise UserError(
            f"{model}: its tokenizer gives no character offsets, which data.loss_on: {loss_on} needs. Use a model with "
            "a tokenizer.json, or data.loss_on: all."
        )
    return chat_format(tokenizer)


def _cache_key(loaded: Loaded, tokenizer, train: Sequence[Source], evaluation: Sequence[Source]) -> str:
    data = loaded.recipe.data
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        # state of the last call, not identity
        vocabulary.pop("truncation", None), vocabulary.pop("padding", None)
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    content = {
        "format": FORMAT_VERSION,
        "vocabulary": vocabulary,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "train": [(source.kind, source.identity) for source in train],
        "eval": [(source.kind, source.identity) for source in evaluation],
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


def _build(loaded: Loaded, tokenizer, chat: ChatFormat | None, train, evaluation, folder: Path) -> None:
    data = loaded.recipe.data
    held_out: set[bytes] = set()
    if data.eval_fraction:
        keys = (row.content_key() for _, row in first_rows(train, data.max_rows))
        held_out = held_out_keys(keys, data.eval_fraction, loaded.recipe.training.seed)
    encode = partial(_encode_sources, tokenizer, chat, data.loss_on, data.max_length)

    def side(held: bool) -> _Rows:
        rows = first_rows(train, data.max_rows)
        return ((i, row) for i, row in rows if (row.content_key() in held_out) == held) if held_out else rows

    summary = {"train": _write(folder / "train", encode, train, side(held=False)), "evaluation": None}
    if held_out:
        summary["evaluation"] = _write(folder / "evaluation", encode, train, side(held=True))
    elif evaluation or data.eval_fraction:
        summary["evaluation"] = _write(folder / "evaluation", encode, evaluation, first_rows(evaluation, None))
    parts = [part for part in (summary["train"], summary["evaluation"]) if part]
    summary["max_token_id"] = max(part.pop("max_token_id") for part in parts)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _encode_sources(
    tokenizer, chat: ChatFormat | None, loss_on: str, max_length: int, sources: Sequence[Source], rows: _Rows
) -> Iterator[Encoded | Dropped]:
    """Samples of all sources in order; a block of text never holds documents of two sources."""
    for index, group in groupby(rows, key=lambda entry: entry[0]):
        source_rows: Iterator[SourceRow] = (row for _, row in group)
        if sources[index].kind == "text":
            yield from encode_text(tokenizer, source_rows, max_length)
        else:
            yield from encode_chat(chat, source_rows, loss_on, max_length)


def _write(folder: Path, encode, sources: Sequence[Source], rows: _Rows) -> dict:
    writer = RowWriter(folder)
    counts = Counter(source_rows=0, truncated=0, dropped=0, turns=0, ends=0)
    reasons: dict[str, dict] = {}

    def counted() -> _Rows:
        name = f"tokenising {folder.name}"
        for entry in tqdm(rows, desc=name, unit=" rows", delay=_PROGRESS_AFTER_SECONDS, mininterval=1):
            counts["source_rows"] += 1
            yield entry

    for sample in encode(sources, counted()):
        if isinstance(sample, Dropped):
            counts["dropped"] += 1
            reasons.setdefault(sample.reason, {"rows": 0, "example": sample.where})["rows"] += 1
            continue
        writer.add(sample.input_ids, sample.trained)
        counts.update(truncated=int(sample.truncated), turns=sample.turns, ends=sample.ends)
    writer.close()
    return {
        "rows": writer.rows,
        "tokens": writer.tokens,
        "trained_tokens": writer.trained_tokens,
        **counts,
        "reasons": reasons,
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


def _check_counts(loaded: Loaded, summary: dict) -> None:
    data = loaded.recipe.data
    for name, part in (("train", summary["train"]), ("eval", summary["evaluation"])):
        if part is None:
            continue
        key = "data.eval_fraction" if name == "eval" and data.eval_fraction else f"data.{name}"
        setting = f"{loaded.where(key)}: {key}"
        total = part["source_rows"]
        if part["dropped"] > MAX_DROPPED_FRACTION * total:
            reasons = "; ".join(
                f"{entry['rows']} because {reason} (first: {entry['example']})"
                for reason, entry in sorted(part["reasons"].items(), key=lambda item: -item[1]["rows"])[:5]
            )
            raise UserError(
                f"{setting}: {part['dropped']} of {total} rows cannot be trained on, at most "
                f"{MAX_DROPPED_FRACTION:.0%} may be dropped: {reasons}."
            )
        if not part["rows"]:
            why = "add rows or name data.eval" if key == "data.eval_fraction" else "its sources are empty or too short"
            raise UserError(f"{setting} leaves no rows: {why}.")


def _describe(summary: dict, say: Callable[[str], None]) -> None:
    state = "reused from" if summary["cache"] == "reused" else "cached in"
    for name, part in (("train", summary), ("evaluation", summary["evaluation"])):
        if part is None:
            continue
        notes = [f"{part[what]:,} {what}" for what in ("truncated", "dropped") if part[what]]
        if part["ends"] < part["turns"]:
            notes.append(f"{part['turns'] - part['ends']:,} of {part['turns']:,} turns without a trained end")
        say(
            f"data: {name} {part['rows']:,} rows, {part['tokens']:,} tokens, {part['trained_tokens']:,} of them trained"
            + (f" ({', '.join(notes)})" if notes else "")
            + f"; {state} {summary['cache_folder']}"
        )
