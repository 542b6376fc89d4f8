"""`include`: recipes made of several files, and errors that point at the file that holds the line."""

import pytest

from finetune.errors import UserError
from finetune.recipe.load import load_recipe

BASE = """\
model: {name_or_path: org/model}
data:
  train: [{path: rows.jsonl}]
training:
  seed: 1
  num_train_epochs: 3
output_dir: runs/base
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files below a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(**files):
        for name, text in files.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    (tmp_path / "rows.jsonl").write_text("{}\n")
    return make


def problems(*overrides):
    with pytest.raises(UserError) as caught:
        load_recipe("recipe.yaml", overrides)
    return list(caught.value.messages)


def test_the_file_wins_over_what_it_includes_and_sections_are_merged(write):
    write(base=BASE, recipe="include: base.yaml\ntraining: {seed: 2}\nlora: {r: 4}\n")
    loaded = load_recipe("recipe.yaml")
    training = loaded.recipe.training
    assert (training.seed, training.num_train_epochs, loaded.recipe.lora.r) == (2, 3, 4)
    assert loaded.location("training.seed") == "recipe.yaml:2"
    assert loaded.location("training.num_train_epochs") == "base.yaml:6"
    assert loaded.is_set("training.num_train_epochs") and not loaded.is_set("training.optim")
    assert "include" not in loaded.dump()


def test_later_includes_win_over_earlier_ones(write):
    write(
        a="training: {seed: 1, weight_decay: 0.1}\n",
        b="training: {seed: 2}\n",
        recipe="include: [a.yaml, b.yaml, base.yaml]\n",
        base=BASE.replace("seed: 1", "optim: sgd"),
    )
    training = load_recipe("recipe.yaml").recipe.training
    assert (training.seed, training.weight_decay, training.optim) == (2, 0.1, "sgd")


def test_lists_are_replaced(write, tmp_path):
    write(base=BASE, recipe="include: base.yaml\ndata: {train: [{path: org/a}, {path: org/b}]}\n")
    assert [source.path for source in load_recipe("recipe.yaml").recipe.data.train] == ["org/a", "org/b"]


def test_of_two_keys_that_exclude_each_other_the_including_file_wins(write):
    write(base=BASE, recipe="include: base.yaml\ntraining: {max_steps: 5}\n")
    training = load_recipe("recipe.yaml").recipe.training
    assert (training.num_train_epochs, training.max_steps) == (None, 5)
    write(recipe="include: base.yaml\ntraining: {max_steps: 5, num_train_epochs: 1}\n")
    assert "both given" in problems()[0]


def test_paths_and_includes_start_at_the_file_that_says_them(write, tmp_path):
    folder = write(recipe="include: sub/mid.yaml\n", sub__mid="include: deep/base.yaml\n", sub__deep__base=BASE)
    (folder / "sub" / "deep" / "rows.jsonl").write_text("{}\n")
    loaded = load_recipe("recipe.yaml")
    assert loaded.recipe.data.train[0].path == str(tmp_path / "sub" / "deep" / "rows.jsonl")
    assert loaded.location("data.train[0].path") == "sub/deep/base.yaml:3"
    (folder / "sub" / "deep" / "rows.jsonl").unlink()
    assert load_recipe("recipe.yaml").recipe.data.train[0].path == str(tmp_path / "rows.jsonl")


def test_errors_point_at_the_file_that_holds_the_line(write):
    write(
        base=BASE.replace("seed: 1", "seed: -1\n  sede: 3"),
        recipe="include: base.yaml\ntraining: {optim: adamv}\nlora: {r: 1, r: 2}\n",
    )
    found = problems("training.warmup_steps=-1")
    assert [message.partition(": ")[0] for message in found] == [
        "recipe.yaml:2",
        "recipe.yaml:3",
        "base.yaml:5",
        "base.yaml:6",
        "command line",
    ]
    assert "training.sede is not a key of training. Did you mean seed?" in found[3]


def test_circles_are_refused_with_the_chain(write):
    write(recipe="include: a.yaml\n", a="seed: 1\ninclude: sub/b.yaml\n", sub__b="include: ../a.yaml\n")
    assert problems() == [
        "sub/b.yaml:1: include goes in a circle: a.yaml -> sub/b.yaml -> a.yaml. Take one of them out."
    ]
    write(recipe="include: ./recipe.yaml\n")
    assert "recipe.yaml:1: include goes in a circle: recipe.yaml -> recipe.yaml." in problems()[0]


def test_the_same_file_may_be_reached_twice_but_not_without_end(write):
    write(base=BASE, a="include: base.yaml\n", b="include: base.yaml\n", recipe="include: [a.yaml, b.yaml]\n")
    assert load_recipe("recipe.yaml").recipe.training.seed == 1
    write(recipe=f"include: [{', '.join(['a.yaml'] * 40)}]\n")
    assert "include reads more than 50 files" in problems()[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("include: gone.yaml\n", "recipe.yaml:1: include names gone.yaml, but there is no such file."),
        (
            "lora: {}\ninclude: 3\n",
            "recipe.yaml:2: include is 3; it must be the name of a recipe file, or a list of names.",
        ),
        ("include: []\n", "include is []; it must be"),
        ("include:\n", "include is null; it must be"),
        ("include: [base.yaml, 3]\n", "include is ['base.yaml', 3]; it must be"),
        ("include: list.yaml\n", "list.yaml:1: a recipe is a mapping of sections"),
        ("include: empty.yaml\n", "empty.yaml: the file is empty. There is nothing to include."),
        ("include: broken.yaml\n", "broken.yaml:2: not valid YAML"),
        ("inclde: base.yaml\n", "inclde is not a key of a recipe. Did you mean include?"),
        ("training: {include: base.yaml}\n", "It belongs to the top level: include."),
    ],
)
def test_wrong_includes(write, text, words):
    write(base=BASE, list="- 1\n", empty="# nothing\n", broken="a: [\n", recipe=text)
    assert any(words in message for message in problems()), problems()


def test_include_cannot_be_overridden(write):
    write(base=BASE, recipe=BASE)
    assert problems("include=base.yaml") == [
        "command line: include cannot be overridden; write a recipe that includes the files."
    ]
