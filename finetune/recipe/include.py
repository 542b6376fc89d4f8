"""`include:` - one recipe out of several files: values merged key by key, each with the file and line it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.recipe.fields import EXCLUSIVE
from finetune.recipe.strict_yaml import KeyPath, parse
from finetune.recipe.validate import show

MAX_FILES = 50


@dataclass(frozen=True)
class Place:
    """A line of a recipe file. `file` is its name as given, `order` sorts files as they were read (recipe first)."""

    file: str
    line: int
    order: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Merged:
    """The values of a recipe and everything it includes, the line of each key, and the problems with their lines."""

    value: dict[str, Any]
    places: Mapping[KeyPath, Place]
    problems: tuple[tuple[Place, str], ...]


def read_merged(name: str) -> Merged:
    """Read the recipe file `name` and what it includes; the file's own keys win, later includes win over earlier ones.

    Mappings are merged, everything else (lists too) is replaced. Raises UserError for files that cannot be read, are
    empty or no mapping, and for includes in a circle (with the chain).
    """
    return _read(name, (), [])


def _read(name: str, chain: tuple[str, ...], seen: list[str]) -> Merged:
    order = len(seen)
    seen.append(name)
    document = parse(_text(name))
    problems = [(Place(name, line, order), message) for line, message in document.problems]
    if document.value is None:
        if problems:
            raise UserError([f"{place}: {message}" for place, message in problems])
        need = "There is nothing to include" if chain else "A recipe needs at least model, data and output_dir"
        raise UserError(f"{name}: the file is empty. {need}.")
    if not isinstance(document.value, dict):
        shown = show(document.value)
        raise UserError(f"{name}:1: a recipe is a mapping of sections (model: ...), but this is {shown}.")
    own = dict(document.value)
    places = {path: Place(name, line, order) for path, line in document.lines.items()}
    value: dict[str, Any] = {}
    merged: dict[KeyPath, Place] = {}
    where = places.get(("include",))
    for included in _included(own.pop("include", _ABSENT), where, problems):
        target = os.path.normpath(os.path.join(os.path.dirname(name), os.path.expanduser(included)))
        _check_chain(target, (*chain, name), where, seen)
        base = _read(target, (*chain, name), seen)
        _merge(value, merged, base.value, base.places)
        problems += base.problems
    _merge(value, merged, own, places)
    return Merged(value, merged, tuple(problems))


_ABSENT = object()


def _included(value: Any, where: Place | None, problems: list[tuple[Place, str]]) -> list[str]:
    """The file names under `include`; anything else becomes a problem."""
    if value is _ABSENT:
        return []
    names = value if isinstance(value, list) else [value]
    if names and all(isinstance(name, str) and name for name in names):
        return names
    assert where is not None
    said = "null" if value is None else show(value)
    problems.append((where, f"include is {said}; it must be the name of a recipe file, or a list of names."))
    return []


def _check_chain(target: str, chain: tuple[str, ...], where: Place | None, seen: list[str]) -> None:
    same = [name for name in chain if os.path.realpath(name) == os.path.realpath(target)]
    if same:
        circle = " -> ".join([*chain[chain.index(same[0]) :], target])
        raise UserError(f"{where}: include goes in a circle: {circle}. Take one of them out.")
    if not Path(target).is_file():
        raise UserError(f"{where}: include names {target}, but there is no such file.")
    if len(seen) >= MAX_FILES:
        raise UserError(f"{where}: include reads more than {MAX_FILES} files; put what they share into one file.")


def _merge(value: dict, places: dict[KeyPath, Place], over: dict, over_places: Mapping[KeyPath, Place]) -> None:
    """Merge `over` into `value` in place, with its lines. Of two keys that exclude each other the later one stays."""
    for pair in EXCLUSIVE:
        for loser, winner in (pair, pair[::-1]):
            section, base = over.get(winner[0]), value.get(loser[0])
            if not isinstance(section, dict) or not isinstance(base, dict) or winner[1] not in section:
                continue
            if loser[1] in base and loser[1] not in section:
                del base[loser[1]]
                _forget(places, loser)
    _merge_mapping(value, over, (), places)
    places.update(over_places)


def _merge_mapping(value: dict, over: dict, path: KeyPath, places: dict[KeyPath, Place]) -> None:
    for key, item in over.items():
        here = (*path, key)
        if isinstance(item, dict) and isinstance(value.get(key), dict):
            _merge_mapping(value[key], item, here, places)
        else:
            _forget(places, here)
            value[key] = item


def _forget(places: dict[KeyPath, Place], path: KeyPath) -> None:
    for known in [p for p in places if p[: len(path)] == path]:
        del places[known]


def _text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{name}: no such recipe file.") from None
    except IsADirectoryError:
        raise UserError(f"{name}: is a folder, not a recipe file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}.") from None
