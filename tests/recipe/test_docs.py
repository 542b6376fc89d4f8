"""What is generated from the code is up to date, and the schema accepts what the reader accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.recipe.strict_yaml import parse
from finetune.recipe.validate import own_keys

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads((ROOT / "finetune/recipe.schema.json").read_text(encoding="utf-8"))


def test_schema_and_pages_are_up_to_date():
    done = subprocess.run([sys.executable, "-m", "scripts.docs.recipe_docs", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python -m scripts.docs.recipe_docs"


def test_the_schema_has_every_key_with_a_description_and_no_null(schema):
    names = {"": schema, **{name: schema["$defs"][name] for name in schema["$defs"]}}
    keys = sum(len(section["properties"]) for section in names.values())
    assert keys == sum(len(k) for section, k in own_keys().items() if not section.startswith("data.eval["))
    for section in names.values():
        assert section["additionalProperties"] is False
        assert all(field.get("description") for field in section["properties"].values())
    assert '"null"' not in json.dumps(schema) and "null" not in json.dumps(schema).split()


def valid(value, node: dict, schema: dict) -> bool:
    """Whether `value` fits this JSON schema; as much of the standard as ours uses."""
    if "$ref" in node:
        return valid(value, schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node and not any(valid(value, option, schema) for option in node["anyOf"]):
        return False
    if ("enum" in node and value not in node["enum"]) or ("const" in node and value != node["const"]):
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if "type" in node and not isinstance(value, kinds[node["type"]]):
        return False
    if isinstance(value, bool) and node.get("type") in ("integer", "number"):
        return False
    if isinstance(value, dict):
        return all(
            (
                valid(item, node["properties"][key], schema)
                if key in node.get("properties", {})
                else node.get("additionalProperties", True) is not False
            )
            for key, item in value.items()
        ) and set(node.get("required", ())) <= set(value)
    if isinstance(value, list):
        return len(value) >= node.get("minItems", 0) and all(
            valid(item, node.get("items", {}), schema) for item in value
        )
    if isinstance(value, (int, float)):
        low, high = node.get("minimum", value), node.get("maximum", value)
        return low <= value <= high and node.get("exclusiveMinimum", value - 1) < value < node.get(
            "exclusiveMaximum", value + 1
        )
    return True


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_shipped_recipe_fits_the_schema(schema, file):
    recipe = parse(file.read_text(encoding="utf-8")).value
    assert valid(recipe, schema, schema)
    assert set(schema["then"]["required"]) <= set(recipe)
    assert not valid(recipe | {"traning": {}}, schema, schema)
    assert not valid(recipe | {"training": {"learning_rate": "fast"}}, schema, schema)


def test_the_page_names_every_key_and_default():
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    for section, keys in own_keys().items():
        if not section.startswith("data.eval["):
            part = page.partition(f"\n## {f'`{section}`' if section else 'The sections'}\n")[2].partition("\n## ")[0]
            assert all(f"| `{key}` |" in part for key in keys), section
    assert "| `learning_rate` | a number of at least 0 | 2e-4 with `lora`, else 2e-5 |" in page
    assert "| `lora_r` | lora.r |" in page
