"""YAML with line numbers: strict enough that what a file says and what is read can never differ.

Recipes and overrides follow YAML 1.2 (`1e-5` is a number, `no` and `on` are text); launch files follow YAML 1.1,
because accelerate reads them so. Duplicate keys, tags, anchors' aliases and deep nesting are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver, Resolver
from yaml.scanner import Scanner

KeyPath = tuple[str | int, ...]  # ("data", "train", 0, "path")

MAX_DEPTH = 20
MAX_CHARACTERS = 1_000_000
_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


@dataclass(frozen=True)
class Document:
    """What a YAML text says. `lines` maps every key path to its 1-based line; `problems` are (line, message) pairs.

    With any problem, `value` holds only what could be read (None when nothing could).
    """

    value: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[tuple[int, str], ...]


class _Resolver12(BaseResolver):
    """The YAML 1.2 core schema."""


for _name, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Resolver12.add_implicit_resolver(_TAG + _name, _pattern, list(_first))


class _StrictComposer(Parser, Composer):
    """Builds the node tree, noting what a strict reader refuses: tags, aliases, deep nesting."""

    def start(self) -> None:
        """Begin a document; yaml's own classes have no common constructor."""
        self.depth = 0
        self.problems: list[tuple[int, str]] = []

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """The next node; a refused one becomes a problem, and is composed as if it were plain."""
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            self.get_event()
            self.problems.append((line, f"the alias *{event.anchor} is not allowed; write the value out."))
            # the stubs let an event have the C parser's marks too, and a node not
            return ScalarNode(_TAG + "str", "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
        if event.tag is not None:
            self.problems.append((line, f"the tag {event.tag} is not allowed; write the plain value."))
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Loader12(Reader, Scanner, _StrictComposer, _Resolver12):
    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver12.__init__(self)
        self.start()


class _Loader11(Reader, Scanner, _StrictComposer, Resolver):
    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        Resolver.__init__(self)
        self.start()


def parse(text: str, *, version: str = "1.2") -> Document:
    """Read one YAML document; never raises for its content, problems are returned with their lines."""
    if len(text) > MAX_CHARACTERS:
        return Document(None, {}, ((1, f"longer than {MAX_CHARACTERS} characters; this is not a settings file."),))
    loader = None
    try:
        loader = (_Loader12 if version == "1.2" else _Loader11)(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        found = tuple(loader.problems) if loader else ()
        return Document(None, {}, (*found, (line, f"not valid YAML: {error.problem or error.context}.")))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(None, {}, ((line, "not valid YAML: a control character is not allowed in it."),))
    lines: dict[KeyPath, int] = {}
    problems = list(loader.problems)
    value = None if node is None else _construct(node, (), lines, problems, version)
    return Document(value, lines, tuple(problems))


def _construct(
    node: Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[tuple[int, str]], version: str
) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                problems.append((line, "a key must be a word, not a list or a mapping."))
                continue
            key = key_node.value
            if key in result:
                first = lines[(*path, key)]
                problems.append((line, f"{dotted((*path, key))} is given twice (first on line {first}); keep one."))
                continue
            lines[(*path, key)] = line
            result[key] = _construct(value_node, (*path, key), lines, problems, version)
        return result
    if isinstance(node, SequenceNode):
        return [_construct(item, (*path, i), lines, problems, version) for i, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    return _scalar(node, problems, version)


def _scalar(node: ScalarNode, problems: list[tuple[int, str]], version: str) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if version == "1.1":
        try:
            return SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ValueError):
            return text
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError as error:  # an explicit tag (already a problem), or an integer of thousands of digits
        problems.append((node.start_mark.line + 1, f"cannot be read: {error}."))
    return text


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def key_path(key: str) -> KeyPath:
    """`data.train[0].path` (or `data.train.0.path`) as a key path; an empty tuple when it is not a dotted key."""
    if not re.fullmatch(r"[\w-]+(?:\.[\w-]+|\[\d+\])*", key):
        return ()
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[\w-]+", key))


class _Dumper(yaml.SafeDumper):
    """SafeDumper quotes what YAML 1.1 would misread; the resolvers added below do the same for YAML 1.2."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists below their key."""
        return super().increase_indent(flow, False)


for _pattern, _name in ((_INT, "int"), (_FLOAT, "float")):
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, list("-+0123456789."))


def dump(value: Any) -> str:
    """YAML text that reads back as the same value under YAML 1.1 and 1.2, keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
