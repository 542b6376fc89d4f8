"""Every key of every shipped recipe, broken in every way: nothing is accepted silently, and the message leads back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.recipe.load import load_recipe
from finetune.recipe.strict_yaml import KeyPath, dotted, parse
from finetune.recipe.validate import own_keys

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
KINDS = ("a letter missing", "letters swapped", "wrong type", "out of range", "null", "duplicated", "moved")


class Pairs(list):
    """A mapping as (key, value) pairs, so that a key can stand twice."""


def as_pairs(value):
    """Nested dicts as Pairs; local paths as hub ids, because the broken copy lies in another folder."""
    if isinstance(value, dict):
        return Pairs(
            (k, "org/" + Path(v).stem if k in ("path", "name_or_path") else as_pairs(v)) for k, v in value.items()
        )
    return [as_pairs(item) for item in value] if isinstance(value, list) else value


def yaml_text(value) -> str:
    """Flow YAML over several lines: a line per entry."""
    if isinstance(value, Pairs):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {yaml_text(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    return json.dumps(value)


def places(value, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Pairs, int]]:
    """Every key: its path, the mapping that holds it, and its index there."""
    for i, item in enumerate(value):
        if isinstance(value, Pairs):
            yield (*path, item[0]), value, i
        here, inner = ((*path, item[0]), item[1]) if isinstance(value, Pairs) else ((*path, i), item)
        if isinstance(inner, list):
            yield from places(inner, here)


def general(path: KeyPath) -> str:
    """`data.train[].path` for data.train[0].path."""
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def wrong_type(value):
    if isinstance(value, (bool, int, float)):
        return "plenty"
    return 3 if isinstance(value, (Pairs, list)) else [value]


def out_of_range(value):
    if isinstance(value, bool):
        return 2
    if isinstance(value, (int, float)):
        return -1
    return [] if isinstance(value, (Pairs, list)) else ""


def another_section(path: KeyPath) -> str:
    """A section that knows no key of this name."""
    own = own_keys()
    return next(s for s in ("training", "model", "logging") if path[-1] not in own[s] and s not in path)


def break_it(tree: Pairs, kind: str, holder: Pairs, index: int, path: KeyPath) -> str | None:
    """Break one key in place. Returns the dotted key that the message must begin with, None where there is no such
    break.
    """
    key, value = holder[index]
    m = len(key) // 2
    if kind == "a letter missing" or kind == "letters swapped":
        wrong = (
            key[:m] + key[m + 1 :] if kind == "a letter missing" else key[: m - 1] + key[m] + key[m - 1] + key[m + 1 :]
        )
        if len(key) < 3 or wrong == key:
            return None
        holder[index] = (wrong, value)
        return dotted((*path[:-1], wrong))
    if kind == "moved":
        section = another_section(path)
        holder.pop(index)
        target = dict(tree).get(section)
        if target is None:
            tree.append((section, target := Pairs()))
        target.append((key, value))
        return f"{section}.{key}"
    if kind == "duplicated":
        holder.append((key, value))
    else:
        new = {"wrong type": wrong_type, "out of range": out_of_range, "null": lambda value: None}[kind](value)
        if new == value:
            return None
        holder[index] = (key, new)
    return dotted(path)


def suggested(message: str) -> str:
    """The key that a message about an unknown key leads to first."""
    for words, end in (("Did you mean ", "?"), ("It belongs to ", "."), ("Use ", " ")):
        if words in message:
            rest = message.partition(words)[2]
            if words.startswith("It"):
                return rest.partition(": ")[2].rstrip(".").split(". ")[0]
            return rest.partition(end)[0].rstrip(".,?")
    return ""


def mutations() -> Iterator[tuple[str, str, str, KeyPath, str]]:
    """(recipe, kind, text, path of the key, dotted key the message must name) for every key and kind."""
    for file in RECIPES:
        value = parse(file.read_text(encoding="utf-8")).value
        for number, _ in enumerate(places(as_pairs(value))):
            for kind in KINDS:
                tree = as_pairs(value)
                path, holder, index = list(places(tree))[number]
                if named := break_it(tree, kind, holder, index, path):
                    yield f"{file.parent.name}/{file.name}", kind, yaml_text(tree), path, named


def test_no_broken_recipe_is_accepted_and_the_message_leads_to_the_right_key(tmp_path):
    total, right, missed = Counter(), Counter(), []
    recipe = tmp_path / "recipe.yaml"
    for name, kind, text, path, named in mutations():
        recipe.write_text(text, encoding="utf-8")
        total[kind] += 1
        with pytest.raises(UserError) as caught:  # anything else would be a traceback
            load_recipe(recipe)
            pytest.fail(f"{name}: {kind}: {dotted(path)} was accepted")
        about = [m for m in caught.value.messages if f"{recipe}:" in m and f" {named} " in m]
        assert about, (name, kind, dotted(path), caught.value.messages)
        if kind in KINDS[:2] or kind == "moved":
            first = suggested(about[0])
            good = first in (path[-1], general(path)) if kind != "moved" else first in (general(path), dotted(path))
        else:
            good = about[0] == caught.value.messages[0]
        right[kind] += good
        if not good:
            missed.append((kind, dotted(path), about[0].replace(f"{recipe}:", "")))
    assert sum(total.values()) >= 300
    assert set(total) == set(KINDS)
    for kind in KINDS:
        assert right[kind] / total[kind] >= 0.9, (kind, dict(right), dict(total), sorted(set(missed))[:20])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_unbroken_the_same_recipes_load(file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml_text(as_pairs(parse(file.read_text(encoding="utf-8")).value)))
    load_recipe(tmp_path / "recipe.yaml")
