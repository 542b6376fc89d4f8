"""Writes what follows from the code: finetune/recipe.schema.json, docs/recipe.md, docs/compatibility.md.

python -m scripts.docs.recipe_docs            writes them
python -m scripts.docs.recipe_docs --check    exits 1 when one of them is out of date (tests do the same)
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from finetune.launch import compatibility
from finetune.recipe.field_types import OPTIM_ALIASES, Section
from finetune.recipe.fields import EXCLUSIVE, Recipe
from finetune.recipe.foreign_keys import BY_TOOL, SAID_IN_WORDS
from finetune.recipe.strict_yaml import dotted
from finetune.recipe.validate import allowed, child_section, show

ROOT = Path(__file__).resolve().parents[2]

HEADER = "<!-- Written by scripts/docs/recipe_docs.py from the code; edit there. -->\n"


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for completion and checks in an editor. `finetune check` knows more."""
    document = _without_null(copy.deepcopy(Recipe.model_json_schema()))
    for definition in [document, *document["$defs"].values()]:
        definition.pop("title", None)
        for field in definition["properties"].values():
            field.pop("title", None)
            if "$ref" in field:
                field.pop("default", None)  # the section's own keys say theirs
                field.setdefault("description", document["$defs"][field["$ref"].rpartition("/")[2]]["description"])
            field["description"] = " ".join(field["description"].split())
    sections = document["$defs"]
    sections["TrainingSection"]["properties"]["optim"]["enum"] += list(OPTIM_ALIASES)
    sections["TrainingSection"]["properties"]["learning_rate"].pop("default")  # it depends on lora
    # a file that includes another one need not repeat what is required
    required = {"required": document.pop("required"), "properties": {}}
    for name, section in (("model", "ModelSection"), ("data", "DataSection")):
        required["properties"][name] = {"required": sections[section].pop("required")}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A recipe of finetune"}
    return head | document | {"if": {"not": {"required": ["include"]}}, "then": required}


def _without_null(node: Any) -> Any:
    """The schema without `null`, which is never a value of a recipe."""
    if isinstance(node, list):
        return [_without_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_null(value) for key, value in node.items() if not (key == "default" and value is None)}
    options = [option for option in node.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        node.pop("anyOf")
        node = options[0] | node
    elif options:
        node["anyOf"] = options
    return node


def _sections(model: type[Section], name: str, field: FieldInfo | None) -> Iterator[tuple[str, type[Section], Any]]:
    yield name, model, field
    for key, inner in model.model_fields.items():
        child, many = child_section(inner)
        if child and key != "eval":
            yield from _sections(child, f"{name}.{key}".lstrip(".") + ("[]" if many else ""), inner)


def _default(key: str, field: FieldInfo) -> str:
    child, _ = child_section(field)
    if key == "training.learning_rate":
        return "2e-4 with `lora`, else 2e-5"
    if field.is_required():
        return "required"
    if child or field.default is None or field.default is PydanticUndefined:
        return ""
    value = field.default
    return f"`{value:g}`" if isinstance(value, float) else f"`{show(value) if isinstance(value, bool) else value}`"


def recipe_page() -> str:
    """docs/recipe.md."""
    parts = [HEADER, _INTRODUCTION]
    for name, model, _ in _sections(Recipe, "", None):
        title = f"`{name}`" if name else "The sections"
        parts.append(f"\n## {title}\n\n{' '.join((model.__doc__ or '').split())}\n")
        if name == "data.train[]":
            parts.append("The entries of `data.eval` have the same keys.\n")
        parts.append("\n| key | value | default | |\n|---|---|---|---|\n")
        for key, inner in model.model_fields.items():
            full = f"{name}.{key}".lstrip(".")
            child, many = child_section(inner)
            value = allowed(inner.annotation, inner.metadata)
            if child:
                value = "a list of mappings" if many else "a section"
            text = " ".join((inner.description or "").split()).replace(" (required)", "")
            parts.append(f"| `{key}` | {value} | {_default(full, inner)} | {text} |\n")
    parts += ["\n", _exclusive(), _aliases(), _foreign()]
    return "".join(parts)


_INTRODUCTION = """\
# The recipe

A recipe says what to learn. A launch file says on which hardware. A recipe is one YAML file, and it is read strictly.
Errors are an unknown key, a value of another type, `null`, a key given twice, and a YAML tag or alias. All errors are
reported at once, each with file, line, what was found and what is allowed. `finetune check recipe.yaml` reports them
without loading anything large. It then checks the launch file (`--launch`), the model's config, the tokenizer, a sample
of the data and the batch arithmetic.

- **Overrides.** `training.learning_rate=1e-5 lora.r=32 "data.train=[{path: mine.jsonl}]"` after the recipe on the
  command line changes single values. Overrides are checked as strictly as the file. If an override and the file set two
  keys that exclude each other, the override wins.
- **Numbers and words** follow YAML 1.2: `1e-5` is a number, `no` and `on` are text.
- **Paths.** `model.name_or_path` and a source's `path` are local if the path exists, relative to the file that sets the
  value or to the working directory. Otherwise the value is a hub id, unless it looks like a file. `output_dir` is
  relative to the working directory.
- **`include: base.yaml`**, or a list of files, names recipes to start from. They are merged in order, then this file.
  Sections are merged key by key, and lists are replaced. Paths in an included file are relative to that file.
- **Each setting has one place.** Processes, machines, mixed precision, ZeRO and offload belong to the launch file.
  Settings that exclude each other are in [compatibility.md](compatibility.md).
- **In an editor**, the first line `# yaml-language-server: $schema=...` of the shipped recipes gives completion.
"""


def _exclusive() -> str:
    lines = [f"- `{dotted(first)}` or `{dotted(second)}`\n" for first, second in EXCLUSIVE]
    return "## At most one of each pair\n\n" + "".join(lines) + "\n"


def _aliases() -> str:
    lines = [f"- `{theirs}` is `{ours}`\n" for theirs, ours in OPTIM_ALIASES.items()]
    return "## Hugging Face's names for `training.optim`\n\n" + "".join(lines) + "\n"


def _foreign() -> str:
    parts = ["## Coming from another tool\n\nThese names are not accepted. The error message gives our name.\n"]
    for tool, names in BY_TOOL.items():
        parts.append(f"\n### {tool}\n\n| theirs | ours |\n|---|---|\n")
        parts += [f"| `{name}` | {target} |\n" for name, target in names.items()]
    parts.append("\n### Without a key here\n\n| theirs | |\n|---|---|\n")
    parts += [f"| `{name}` | {sentence} |\n" for name, sentence in SAID_IN_WORDS.items()]
    return "".join(parts)


def compatibility_page() -> str:
    """docs/compatibility.md."""
    return f"""\
{HEADER}# Incompatible settings

`finetune check`, `finetune train` and the trainer refuse these combinations of recipe and launch file before anything
is loaded. The message gives the reason and the nearest combination that works. All other combinations are meant to
work. A test checks that every shipped recipe either works with every shipped launch file or is refused by a line below.

{compatibility.table()}"""


def pages() -> dict[Path, str]:
    """Every generated file and what it must contain."""
    return {
        ROOT / "finetune" / "recipe.schema.json": json.dumps(schema(), indent=1) + "\n",
        ROOT / "docs" / "recipe.md": recipe_page(),
        ROOT / "docs" / "compatibility.md": compatibility_page(),
    }


def main() -> None:
    wrong = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in wrong:
            print(f"{path.relative_to(ROOT)} is out of date; run python -m scripts.docs.recipe_docs", file=sys.stderr)
        sys.exit(1 if wrong else 0)
    for path in wrong:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
