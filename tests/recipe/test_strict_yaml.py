"""The YAML reader: YAML 1.2 values, lines, and what it refuses."""

from itertools import pairwise

import pytest

from finetune.recipe.strict_yaml import dotted, dump, key_path, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+5", 1e5),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("-3", -3),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1'", "1"),
        ("all-linear", "all-linear"),
        ("[{path: x.jsonl}]", [{"path": "x.jsonl"}]),
    ],
)
def test_values_follow_yaml_1_2(text, value):
    document = parse(text)
    assert document.problems == ()
    assert document.value == value
    assert type(document.value) is type(value)


def test_infinities_are_numbers():
    assert parse("[.inf, -.INF]").value == [float("inf"), float("-inf")]
    assert parse(".nan").value != parse(".nan").value


def test_launch_files_are_read_as_accelerate_reads_them():
    assert parse("{a: no, b: 1e-5, c: 012}", version="1.1").value == {"a": False, "b": "1e-5", "c": 10}


def test_every_key_knows_its_line():
    document = parse("a:\n  b: 1\n  c:\n    - {d: 2}\n    - d: 3\n")
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", 0, "d")] == 4
    assert document.lines[("a", "c", 1, "d")] == 5


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is given twice (first on line 1)"),
        ("a:\n  x: 1\n  x: 1\n", 3, "a.x is given twice"),
        ("a: !!python/object:os.system x\n", 1, "tag"),
        ("a: !!str 1\n", 1, "tag"),
        ("a: &x [1]\nb: *x\n", 2, "alias *x"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("a: [1\n", 2, "not valid YAML"),
        ("a:\n\t- 1\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("a: 1\nb: \x07\n", 2, "control character"),
        ("[a, b]: 1\n", 1, "a key must be a word"),
        ("a: " + "[" * 50 + "]" * 50, 1, "nested too deeply"),
        ("a: " + "9" * 5000, 1, "cannot be read"),
    ],
)
def test_refused_with_the_line(text, line, words):
    problems = parse(text).problems
    assert any(at == line and words in message for at, message in problems), problems


def test_an_alias_bomb_is_refused_at_once():
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in pairwise("abcdefghijklmnop"))
    assert len(parse(bomb).problems) == 30


def test_a_very_large_file_is_refused():
    assert "longer than" in parse("a: " + "x" * 1_000_001).problems[0][1]


@pytest.mark.parametrize("text", "1e5|no|on|012|0o7|1_000|null|~|true||.5|a: b|#x|é|12e4567|- a|2026-01-01".split("|"))
def test_dumped_text_reads_back_as_text(text):
    assert parse(dump({"key": text})).value == {"key": text}
    assert parse(dump({"key": text}), version="1.1").value == {"key": text}


@pytest.mark.parametrize("number", [1e-5, 1e-8, 2.0, 1e22, 0.1 + 0.2, -0.0, 7])
def test_dumped_numbers_keep_every_bit(number):
    back = parse(dump([number])).value[0]
    assert repr(back) == repr(number)


def test_dotted_keys_and_back():
    assert dotted(("data", "train", 0, "path")) == "data.train[0].path"
    assert key_path("data.train[0].path") == key_path("data.train.0.path") == ("data", "train", 0, "path")
    assert key_path("a..b") == key_path("") == key_path("[0]") == ()
