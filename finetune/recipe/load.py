"""Reads a recipe: strict YAML and command-line overrides become one frozen `Recipe`, or every problem at once."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.recipe.fields import EXCLUSIVE, Recipe
from finetune.recipe.include import MAX_FILES, Place, read_merged
from finetune.recipe.strict_yaml import KeyPath, dotted, dump, key_path, parse
from finetune.recipe.validate import check, lookup, show
from finetune.report import redact

COMMAND_LINE = "command line"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?$")
_FILE_NAME = re.compile(r"\.(?:jsonl?|txt|csv|tsv|parquet|arrow|md|ya?ml|gz|zst|safetensors|gguf|bin)$", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where each of its values came from."""

    recipe: Recipe
    path: Path  # of the recipe file, absolute
    _name: str = field(repr=False)
    _given: Mapping[str, Any] = field(repr=False)
    _places: Mapping[KeyPath, Place] = field(repr=False)
    _overridden: frozenset[KeyPath] = field(repr=False)

    def location(self, key: str) -> str:
        """Where a dotted key (`data.train[0].path`) was set: `recipe.yaml:14` or `command line`.

        The file may be an included one. For a key that was not set: its section's line, or the file alone.
        """
        place = _place(key_path(key), self._name, self._places, self._overridden)
        return place.file if not place.line else str(place)

    def is_set(self, key: str) -> bool:
        """Whether the file or an override gives the dotted key (False: it has its default)."""
        return lookup(self._given, key_path(key)) is not None

    def sample(self, rows: int, source: int | None = None) -> LoadedRecipe:
        """This recipe with at most `rows` training rows.

        With `source`, an index, only that entry of data.train is kept, and no data.eval. `where` still names the right
        lines.
        """
        data = self.recipe.data
        changes: dict[str, Any] = {"max_rows": min(rows, data.max_rows or rows)}
        places, overridden = dict(self._places), set(self._overridden)
        if source is not None:
            changes |= {"train": [data.train[source]], "eval": None}
            places = {new: place for key, place in places.items() if (new := _first_source(key, source))}
            overridden = {new for key in overridden if (new := _first_source(key, source))}
        recipe = self.recipe.model_copy(update={"data": data.model_copy(update=changes)})
        return replace(self, recipe=recipe, _places=places, _overridden=frozenset(overridden))

    def dump(self) -> str:
        """The resolved recipe as YAML: every default written out, no nulls, local paths absolute, secrets taken out."""
        return dump(redact.tree(self.recipe.model_dump(exclude_none=True)))


def read_resolved(path: Path) -> dict | None:
    """The values of a resolved recipe in a run's folder; None where there is none that can be read."""
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return document.value if isinstance(document.value, dict) else None


def load_resolved(path: Path) -> LoadedRecipe:
    """The resolved recipe in a run's folder. Its data need not be there any more. Raises UserError."""
    document = parse(path.read_text(encoding="utf-8")) if path.is_file() else None
    if document is None or document.problems or not isinstance(document.value, dict):
        said = "is not there or not readable; it says what the checkpoints hold. Give a run's output folder."
        raise UserError(f"{path}: {said}")
    recipe, problems = check(document.value)
    if problems or recipe is None:
        raise UserError([f"{path}: {sentence}" for _, sentence in problems])
    return LoadedRecipe(recipe, path.absolute(), str(path), document.value, {}, frozenset())


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read the recipe at `path` with what it includes, then apply `section.key=value` overrides.

    Paths in the file are looked up in the recipe's folder, then in the working directory; in overrides the other way
    round. An override of one of two keys that exclude each other (max_steps, num_train_epochs) replaces the other.

    Raises UserError with every problem found, each starting with its file and line.
    """
    name = os.fspath(path)
    merged = read_merged(name)
    problems: list[tuple[Place, str]] = list(merged.problems)
    given = copy.deepcopy(merged.value)
    overridden, wrong = _override(given, overrides)
    resolved = copy.deepcopy(given)
    found = _resolve_paths(resolved, merged.places, Path(name).parent, overridden)
    recipe, more = check(resolved)
    problems += [(_place(key, name, merged.places, overridden), sentence) for key, sentence in [*found, *more]]
    problems.sort(key=lambda problem: (problem[0].order, problem[0].line))
    messages = [f"{place if place.line else place.file}: {sentence}" for place, sentence in problems] + wrong
    if messages or recipe is None:
        raise UserError(messages)
    return LoadedRecipe(recipe, Path(name).absolute(), name, given, merged.places, frozenset(overridden))


def _first_source(key: KeyPath, source: int) -> KeyPath | None:
    """`key` where data.train holds only its entry `source`; None for keys of the other entries."""
    if key[:2] != ("data", "train") or len(key) == 2:
        return key
    return ("data", "train", 0, *key[3:]) if key[2] == source else None


def _place(
    key: KeyPath, name: str, places: Mapping[KeyPath, Place], overridden: frozenset[KeyPath] | set[KeyPath]
) -> Place:
    """Where a key was set. Line 0: in no file, or on the command line."""
    if any(key[:n] in overridden for n in range(1, len(key) + 1)):
        return Place(COMMAND_LINE, 0, MAX_FILES + 1)
    return next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), Place(name, 0))


def _override(given: dict[str, Any], overrides: Sequence[str]) -> tuple[set[KeyPath], list[str]]:
    """Write the overrides into `given`; returns the key paths they set and the sentences about bad ones."""
    overridden: set[KeyPath] = set()
    wrong: list[str] = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        path = key_path(key)
        if not equals or not path:
            wrong.append(f"{COMMAND_LINE}: '{text}' is not an override; write section.key=value.")
            continue
        if path[0] == "include":
            wrong.append(f"{COMMAND_LINE}: include cannot be overridden; write a recipe that includes the files.")
            continue
        value = parse(value_text)
        if value.problems:
            wrong += [f"{COMMAND_LINE}: {key}: {message} Quote the value?" for _, message in value.problems]
        elif path in overridden:
            wrong.append(f"{COMMAND_LINE}: {key} is given twice; keep one.")
        elif blocker := _set(given, path, value.value):
            wrong.append(f"{COMMAND_LINE}: {key} cannot be set: {blocker}.")
        else:
            overridden.add(path)
    for pair in EXCLUSIVE:
        for loser, winner in (pair, pair[::-1]):
            if winner in overridden and loser not in overridden and isinstance(section := given.get(loser[0]), dict):
                section.pop(loser[1], None)
    return overridden, wrong


def _set(given: dict[str, Any], path: KeyPath, value: Any) -> str:
    """Put `value` at `path`, making sections on the way; returns why not, or an empty string."""
    holder: Any = given
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(holder, dict) and isinstance(part, str):
            if last:
                holder[part] = value
            elif holder.get(part) is None:
                holder[part] = {}
        elif isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            if last:
                holder[part] = value
        else:
            what = f"a list of {len(holder)}" if isinstance(holder, list) else show(holder)
            return f"{dotted(path[:depth]) or 'the recipe'} is {what}"
        holder = holder[part]
    return ""


def _resolve_paths(
    given: dict[str, Any], places: Mapping[KeyPath, Place], recipe_folder: Path, overridden: set[KeyPath]
) -> list[tuple[KeyPath, str]]:
    """Make local paths in `given` absolute, in place; returns what is missing."""
    keys: list[KeyPath] = [("model", "name_or_path")]
    for part in ("train", "eval"):
        sources = lookup(given, ("data", part))
        keys += [("data", part, i, "path") for i in range(len(sources) if isinstance(sources, list) else 0)]
    problems = []
    for key in keys:
        value = lookup(given, key)
        if not isinstance(value, str) or not value:
            continue
        from_override = any(key[:n] in overridden for n in range(1, len(key) + 1))
        folder = Path(places[key].file).parent if key in places and not from_override else recipe_folder
        bases = (Path.cwd(), folder.absolute()) if from_override else (folder.absolute(), Path.cwd())
        candidates = list(dict.fromkeys(os.path.abspath(base / os.path.expanduser(value)) for base in bases))
        existing = [place for place in candidates if os.path.exists(place)]
        if existing:
            _set(given, key, existing[0])
        elif value[0] in "./~" or value.count("/") > 1 or _FILE_NAME.search(value) or not _HUB_ID.match(value):
            problems.append((key, f"{dotted(key)} is '{value}', but there is no {' and no '.join(candidates)}."))
    if isinstance(output := given.get("output_dir"), str) and output:
        given["output_dir"] = os.path.abspath(os.path.expanduser(output))
    return problems
