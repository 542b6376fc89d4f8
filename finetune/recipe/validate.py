"""Finds everything wrong with a recipe's values at once; a message names the value found and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finetune.recipe.field_types import AUTO_OR_SIZE, Section
from finetune.recipe.fields import EXCLUSIVE, Recipe
from finetune.recipe.rules import recipe_refusals
from finetune.recipe.sizes import parse_bytes
from finetune.recipe.strict_yaml import KeyPath, dotted, key_path
from finetune.recipe.suggest import closest, suggest, suggest_inside

Problem = tuple[KeyPath, str]  # where it is, and the sentence


def check(given: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that the nested mapping `given` says, or None and every problem in it."""
    problems: list[Problem] = []
    pruned = _prune(Recipe, dict(given), (), problems)
    problems += _conflicts(given)
    reported = {path for path, _ in problems}
    try:
        recipe = Recipe.model_validate(pruned)
    except ValidationError as error:
        recipe = None
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            path, field = _locate(detail["loc"])
            if any(path[:n] in reported for n in range(1, len(path) + 1)):
                continue
            reported.add(path)
            problems.append((path, _sentence(path, field, detail["type"], given)))
    readable = recipe or _readable(pruned, reported)
    for key, sentence in recipe_refusals(readable) if readable else ():
        problems.append((key_path(key), sentence))
    return (None if problems else recipe), problems


def _readable(pruned: dict[str, Any], reported: set[KeyPath]) -> Recipe | None:
    """The recipe without its wrong values, so that combinations are still judged; None where that leaves none."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in pruned.items()}
    for path in filter(None, reported):
        section = str(path[0])  # the outermost key is never a list's index
        if len(path) > 1 and isinstance(kept.get(section), dict):
            kept[section].pop(path[1], None)
        else:
            kept.pop(section, None)
    try:
        return Recipe.model_validate(kept)
    except ValidationError:
        return None


@cache
def own_keys() -> dict[str, list[str]]:
    """Every section's dotted name ("" at the top, `data.train[]` for list items) and its keys."""
    return dict(_sections(Recipe, ""))


def _sections(model: type[Section], name: str) -> Iterator[tuple[str, list[str]]]:
    yield name, list(model.model_fields)
    for key, field in model.model_fields.items():
        child, many = child_section(field)
        if child:
            yield from _sections(child, f"{name}.{key}".lstrip(".") + ("[]" if many else ""))


def child_section(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """The section class behind a field, and whether the field holds a list of them."""
    for option in _options(field.annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option, False
        if get_origin(option) is list and isinstance(get_args(option)[0], type):
            item = get_args(option)[0]
            if issubclass(item, Section):
                return item, True
    return None, False


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union without None, Annotated peeled off."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    elif annotation is not NoneType:
        yield annotation


def _prune(model: type[Section], value: Any, path: KeyPath, problems: list[Problem]) -> dict[str, Any]:
    """`value` without what is not a key, null or not a mapping; each of these becomes a problem."""
    kept: dict[str, Any] = {}
    for key, item in value.items():
        here, field = (*path, key), model.model_fields.get(key)
        if field is None:
            problems.append((here, _unknown(path, key, item)))
            continue
        child, many = child_section(field)
        if item is None:
            empty = "Write {} for its defaults, or leave the section out." if child else "Leave it out for its default."
            problems.append((here, f"{dotted(here)} is null, which is never a value. {empty}"))
        elif child and many and isinstance(item, list):
            kept[key] = [_mapping(child, entry, (*here, i), problems) for i, entry in enumerate(item)]
        elif child and not many:
            kept[key] = _mapping(child, item, here, problems)
        else:
            kept[key] = item
    return kept


def _mapping(model: type[Section], value: Any, path: KeyPath, problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        return _prune(model, value, path, problems)
    keys = ", ".join(model.model_fields)
    problems.append((path, f"{dotted(path)} is {show(value)}; it must be a mapping with keys among {keys}."))
    return {}


def _unknown(path: KeyPath, key: str, value: Any) -> str:
    section = dotted(path)
    general = "".join("[]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    what = f"a key of {section}" if section else "a key of a recipe"
    inside = suggest_inside(value, own_keys()) if isinstance(value, (dict, list)) else ""
    return f"{dotted((*path, key))} is not {what}. {suggest(general, key, own_keys())}{inside}"


def _conflicts(given: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    for first, second in EXCLUSIVE:
        if lookup(given, first) is not None and lookup(given, second) is not None:
            problems.append((second, f"{dotted(first)} and {dotted(second)} are both given; keep one of them."))
    return problems


def lookup(given: Any, path: KeyPath) -> Any:
    """The value at `path` of nested mappings and lists, None when there is none."""
    for part in path:
        if isinstance(given, dict):
            given = given.get(part)
        elif isinstance(given, list) and isinstance(part, int) and part < len(given):
            given = given[part]
        else:
            return None
    return given


def _locate(loc: tuple[str | int, ...]) -> tuple[KeyPath, FieldInfo | None]:
    """The key path in a pydantic error location (which also names union members), and its field."""
    model: type[Section] | None = Recipe
    path: list[str | int] = []
    field = None
    for part in loc:
        if isinstance(part, int) and field is not None and child_section(field)[1]:
            path.append(part)
            model = child_section(field)[0]
        elif model is not None and part in model.model_fields:
            path.append(part)
            field = model.model_fields[str(part)]
            child, many = child_section(field)
            model = None if many else child
        elif part != "SourceSection":
            break
    return tuple(path), field


def _sentence(path: KeyPath, field: FieldInfo | None, kind: str, given: Mapping[str, Any]) -> str:
    name = dotted(path)
    if kind == "missing" or field is None:
        return f"{name} is missing and required" + (f": {field.description}" if field and field.description else ".")
    value = lookup(given, path)
    hint = ""
    if AUTO_OR_SIZE in field.metadata:
        hint = _no_size(value)
    elif isinstance(value, str):
        hint = closest(value, _choices(field.annotation))
        if not hint and any(option in (int, float, bool) for option in _options(field.annotation)) and _plain(value):
            hint = " Remove the quotes."
    elif str in list(_options(field.annotation)) and not isinstance(value, (dict, list)):
        hint = " Put quotes around it."
    return f"{name} is {show(value)}; it must be {allowed(field.annotation, field.metadata)}.{hint}"


def _no_size(value: Any) -> str:
    if isinstance(value, str) and (near := closest(value, ["auto"])):
        return near
    try:
        parse_bytes(show(value) if isinstance(value, (dict, list)) else value)
    except ValueError as error:
        return f" {error}"
    return ""


def _plain(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def _choices(annotation: Any) -> list[str]:
    return [c for o in _options(annotation) if get_origin(o) is Literal for c in get_args(o) if isinstance(c, str)]


def show(value: Any) -> str:
    """A value as its YAML would write it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def allowed(annotation: Any, metadata: Any = ()) -> str:
    """In words, what a field takes: `a whole number of at least 1, or auto`."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return allowed(inner, [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])])
    if AUTO_OR_SIZE in metadata:
        return "auto, or a size such as 40GiB"
    if get_origin(annotation) in (Union, UnionType):
        return ", or ".join(allowed(o, metadata) for o in get_args(annotation) if o is not NoneType)
    if get_origin(annotation) is Literal:
        words = [show(c) if isinstance(c, bool) else str(c) for c in get_args(annotation)]
        return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
    if get_origin(annotation) is list:
        item = get_args(annotation)[0]
        if any(get_origin(option) is list for option in _options(item)):
            return "a list of pairs of numbers above 0 and at most 1, such as [[0.5, 0.1], [1.0, 1.0]]"
        if any(option is int for option in _options(item)):
            return "a list of whole numbers of at least 1"
        if get_origin(item) is Literal:
            return f"a list of {allowed(item)}"
        sections = isinstance(item, type) and issubclass(item, Section)
        least = " with at least one entry" if metadata else ""
        return f"a list of {'mappings such as {path: ...}' if sections else 'names'}{least}"
    if get_origin(annotation) is dict:
        return "a mapping of names to names"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text (not empty)"}
    return names.get(annotation, "a mapping") + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = [f"{words[k]} {getattr(m, k)}" for m in metadata for k in words if hasattr(m, k)]
    return f" of {' and '.join(found)}" if found else ""
