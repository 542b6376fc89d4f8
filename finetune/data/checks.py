"""Whether tokenizer, sources and settings fit together, and what is printed about the rows that came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.chat_template import ChatFormat, chat_format, missing_end, pair_format
from finetune.data.sources import Source
from finetune.data.tokenization import text_prefix
from finetune.errors import UserError
from finetune.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_formats(
    loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]
) -> dict[str, ChatFormat]:
    """The chat format of each kind of source that needs one ("chat", "pair").

    Raises UserError where tokenizer, sources and data.loss_on do not fit.
    """
    model = f"{loaded.location('model.name_or_path')}: model.name_or_path"
    of_kind = {source.kind: source for source in reversed(sources)}
    loss_on = loaded.recipe.data.loss_on
    if set(of_kind) == {"text"} and loaded.is_set("data.loss_on") and loss_on != "all":
        raise UserError(
            f"{loaded.location('data.loss_on')}: data.loss_on is '{loss_on}', but {of_kind['text'].name} "
            f"({of_kind['text'].setting}) is plain text, which has no assistant turns. Use data.loss_on: all."
        )
    if of_kind.keys() - {"chat"} and tokenizer.eos_token_id is None:
        source = of_kind.get("text") or of_kind["pair"]
        raise UserError(f"{model}: its tokenizer has no eos token, which has to end every row of {source.name}.")
    formats = {}
    for kind in of_kind.keys() & {"chat", "pair"}:
        formats[kind] = _format(loaded, tokenizer, of_kind[kind], model)
        tag = missing_end(formats[kind])
        if tag:
            raise UserError(
                f"{model}: its chat template ends every turn with {tag}, which its tokenizer does not have as one"
                " token: the trained model could not stop. Use the tokenizer the template was written for."
            )
    if of_kind.keys() & {"chat", "pair"} and loss_on != "all" and not tokenizer.is_fast:
        raise UserError(
            f"{model}: its tokenizer gives no character offsets, which data.loss_on: {loss_on} needs. Use a model with "
            "a tokenizer.json, or data.loss_on: all."
        )
    return formats


def _format(loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase, source: Source, model: str) -> ChatFormat:
    if tokenizer.chat_template:
        return chat_format(tokenizer)
    if source.kind == "pair":
        return pair_format(tokenizer, tokenizer.decode(text_prefix(tokenizer)))
    raise UserError(
        f"{model}: its tokenizer has no chat template, which the conversations of {source.name} need. Use the "
        "instruction-tuned variant of the model, or a copy of it with a chat_template.jinja."
    )


def count_problems(loaded: LoadedRecipe, summary: Mapping[str, Any]) -> list[str]:
    """What is wrong with the rows that came out (too many dropped, none left), each a sentence with file and line."""
    data = loaded.recipe.data
    problems = []
    for name, part in (("train", summary["train"]), ("eval", summary["evaluation"])):
        if part is None:
            continue
        key = "data.eval_fraction" if name == "eval" and data.eval_fraction else f"data.{name}"
        setting = f"{loaded.location(key)}: {key}"
        total = part["source_rows"]
        if part["dropped"] > data.max_dropped_fraction * total:
            reasons = "; ".join(
                f"{entry['rows']} because {reason} (first: {entry['example']})"
                for reason, entry in sorted(part["reasons"].items(), key=lambda item: -item[1]["rows"])[:5]
            )
            problems.append(
                f"{setting}: {part['dropped']} of {total} rows cannot be trained on, at most "
                f"{data.max_dropped_fraction:.0%} may be dropped (data.max_dropped_fraction): {reasons}."
            )
        elif not part["rows"]:
            why = "add rows or name data.eval" if key == "data.eval_fraction" else "its sources are empty or too short"
            problems.append(f"{setting} leaves no rows: {why}.")
        elif part["turns"] and not part["ends"]:
            problems.append(
                f"{setting}: the end of the turn is trained in none of {part['turns']} assistant turns, so the model"
                " would never learn to stop: the template writes no end-of-turn token, or data.max_length cuts every"
                " row."
            )
    return problems


def describe(
    sources: Sequence[Source],
    summary: Mapping[str, Any],
    formats: Mapping[str, ChatFormat],
    say: Callable[[str], None],
) -> None:
    """One line per split for people, and one per source that has something to explain."""
    for source in sources:
        notes = []
        if source.kind == "pair":
            through = formats["pair"].tokenizer.chat_template
            notes.append("through the chat template" if through else "as plain text, there is no chat template")
        if source.shape.format == "preference":
            notes.append("the chosen answers")
        if source.shape.unused:
            notes.append(f"columns not used: {', '.join(source.shape.unused)}")
        if source.weight != 1:
            notes.append(f"weight {source.weight:g}")
        if notes:
            say(f"data: {source.name} is read as {source.shape.format} ({'; '.join(notes)})")
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
