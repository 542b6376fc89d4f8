"""Wrong recipes: every problem at once, each with its place, the value found and what to write instead."""

import os

import pytest

from finetune.errors import UserError
from finetune.recipe.fields import Recipe
from finetune.recipe.foreign_keys import BY_TOOL, FOREIGN, SAID_IN_WORDS
from finetune.recipe.load import load_recipe
from finetune.recipe.suggest import LATER, suggest
from finetune.recipe.validate import own_keys

MINIMAL = "model: {name_or_path: org/model}\ndata: {train: [{path: org/rows}]}\noutput_dir: x\n"


def problems(tmp_path, text, *overrides):
    """The messages about a recipe, with the folder's name cut off."""
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml", overrides)
    return [message.replace(f"{tmp_path}/", "") for message in caught.value.messages]


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path):
    text = """\
model:
  name_or_path: org/model
  dtyp: auto
lora:
data:
  train:
    - {path: gone.jsonl, splt: train}
  packing: sometimes
training:
  global_batch_sise: 3
  learning_rate: "1e-5"
  lr_scheduler_type: cosin
  seed: -1
  seed: 3
  max_length: 5
cutoff_len: 32
"""
    found = problems(tmp_path, text, "training.learnin_rate=3")
    assert found == [
        (
            "recipe.yaml: output_dir is missing and required:"
            " Folder of the run, relative to the working directory (required)."
        ),
        "recipe.yaml:3: model.dtyp is not a key of model. Did you mean dtype?",
        "recipe.yaml:4: lora is null, which is never a value. Write {} for its defaults, or leave the section out.",
        (
            "recipe.yaml:7: data.train[0].path is 'gone.jsonl', but there is no gone.jsonl and no"
            f" {os.getcwd()}/gone.jsonl."
        ),
        "recipe.yaml:7: data.train[0].splt is not a key of data.train[0]. Did you mean split?",
        "recipe.yaml:8: data.packing is 'sometimes'; it must be true or false.",
        "recipe.yaml:10: training.global_batch_sise is not a key of training. Did you mean global_batch_size?",
        "recipe.yaml:11: training.learning_rate is '1e-5'; it must be a number of at least 0. Remove the quotes.",
        (
            "recipe.yaml:12: training.lr_scheduler_type is 'cosin'; it must be constant, linear, cosine or"
            " cosine_with_min_lr. Did you mean cosine?"
        ),
        "recipe.yaml:13: training.seed is -1; it must be a whole number of at least 0 and at most 4294967295.",
        "recipe.yaml:14: training.seed is given twice (first on line 13); keep one.",
        "recipe.yaml:15: training.max_length is not a key of training. It belongs to data: data.max_length.",
        "recipe.yaml:16: cutoff_len is not a key of a recipe. Use data.max_length.",
        "command line: training.learnin_rate is not a key of training. Did you mean learning_rate?",
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.seed", "true", "is true; it must be a whole number"),
        ("training.seed", "1.0", "is 1.0; it must be a whole number"),
        ("training.learning_rate", "true", "is true; it must be a number"),
        ("training.learning_rate", ".inf", "is inf; it must be a number"),
        ("training.learning_rate", "-1", "of at least 0"),
        ("training.gradient_checkpointing", "yes", "is 'yes'; it must be true or false"),
        ("training.gradient_checkpointing", "1", "it must be true or false"),
        ("training.gradient_accumulation_steps", "0", "a whole number of at least 1, or auto"),
        ("training.per_device_train_batch_size", "atuo", "Did you mean auto?"),
        ("training.optim", "adamw_8bits", "Did you mean adamw_8bit?"),
        ("training.adam_beta2", "1", "less than 1"),
        (
            "training.device_memory",
            "40",
            "is 40; it must be auto, or a size such as 40GiB. 40 has no unit; write 40GiB (40 x 2^30 bytes)",
        ),
        (
            "training.device_memory",
            "1.5",
            "is 1.5; it must be auto, or a size such as 40GiB. 1.5 has no unit; write 1.5GiB",
        ),
        ("training.device_memory", "40gib", "did you mean 40GiB?"),
        ("training.device_memory", "'40 gb'", "write 40GiB (40 x 2^30 bytes) or 40GB (40 x 10^9)."),
        (
            "training.device_memory",
            "0GiB",
            "is '0GiB'; it must be auto, or a size such as 40GiB. 0GiB is less than one byte",
        ),
        ("training.device_memory", "Auto", "Did you mean auto?"),
        ("training.device_memory", "true", "is true; it must be auto, or a size such as 40GiB. true is no size"),
        ("training.device_memory", "[2GiB]", "it must be auto, or a size such as 40GiB."),
        ("training.device_memory", "''", "it must be auto, or a size such as 40GiB."),
        ("training.num_train_epochs", "0", "more than 0"),
        ("training.max_steps", "[1]", "is [1]; it must be a whole number"),
        ("training.seed", "", "training.seed is null, which is never a value. Leave it out for its default."),
        ("training", "3", "training is 3; it must be a mapping with keys among num_train_epochs"),
        ("model.revision", "1e5", "Put quotes around it."),
        ("model.name_or_path", "''", "it must be text (not empty)"),
        ("data.train", "[]", "a list of mappings such as {path: ...} with at least one entry"),
        ("data.train", "org/rows", "a list of mappings such as {path: ...}"),
        ("data.train", "[org/rows]", "data.train[0] is 'org/rows'; it must be a mapping with keys among path, split,"),
        ("data.train", "[{split: x}]", "data.train[0].path is missing and required"),
        ("data.max_length", "1", "of at least 2"),
        ("data.eval_fraction", "1", "less than 1"),
        ("lora.target_modules", "q_proj", "all-linear, or a list of names with at least one entry"),
        ("lora.target_modules", "[1]", "a list of names"),
        ("model.load_in_4bit", "true", "4-bit weights cannot be trained: add a lora section"),
    ],
)
def test_wrong_values_in_file_and_override(tmp_path, key, value, words):
    by_override = problems(tmp_path, MINIMAL, f"{key}={value}")
    assert len(by_override) == 1
    assert by_override[0].startswith(f"command line: {key}") and words in by_override[0]
    section, _, leaf = key.partition(".")
    if not leaf or section in ("model", "data"):
        return
    in_file = problems(tmp_path, MINIMAL + f"{section}:\n  {leaf}: {value}\n")
    assert len(in_file) == 1
    assert in_file[0].startswith(f"recipe.yaml:5: {key}") and words in in_file[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("training.num_train_epochs=1", "training.max_steps=3"),
        ("training.warmup_ratio=0.1", "training.warmup_steps=3"),
        ("data.eval=[{path: org/rows}]", "data.eval_fraction=0.1"),
    ],
)
def test_of_two_keys_that_exclude_each_other_one_is_refused(tmp_path, one, other):
    (message,) = problems(tmp_path, MINIMAL, one, other)
    assert f"{one.partition('=')[0]} and {other.partition('=')[0]} are both given; keep one of them." in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--learning_rate", "is not an override; write section.key=value"),
        ("training.seed", "is not an override"),
        ("=3", "is not an override"),
        ("training.seed=[", "training.seed: not valid YAML"),
        ("training.seed.x=3", "training.seed.x cannot be set: training.seed is 3"),
        ("data.train[4].path=x", "data.train[4].path cannot be set: data.train is a list of 1"),
        ("learning_rate=1e-5", "It belongs to training: training.learning_rate."),
        ("lora=", "lora is null"),
    ],
)
def test_bad_overrides(tmp_path, override, words):
    found = problems(tmp_path, MINIMAL + "training: {seed: 3}\n", override)
    assert len(found) == 1 and found[0].startswith("command line: ") and words in found[0]


def test_an_override_given_twice_is_refused(tmp_path):
    found = problems(tmp_path, MINIMAL, "training.seed=1", "training.seed=2")
    assert found == ["command line: training.seed is given twice; keep one."]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n", "recipe.yaml:1: a recipe is a mapping of sections"),
        (b"just words", "recipe.yaml:1: a recipe is a mapping"),
        (b"a: [1\n", "recipe.yaml:2: not valid YAML"),
        (b"a: \xff\n", "is not UTF-8 text (byte 3)"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert words in str(caught.value)


def test_a_device_memory_in_file_and_override(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL + "training: {device_memory: 40GB}\n")
    assert load_recipe(tmp_path / "recipe.yaml").recipe.training.device_memory == "40GB"
    assert (
        load_recipe(tmp_path / "recipe.yaml", ["training.device_memory=2GiB"]).recipe.training.device_memory == "2GiB"
    )
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    assert load_recipe(tmp_path / "recipe.yaml").recipe.training.device_memory == "auto"


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)


def test_keys_that_come_later_are_refused_by_name(tmp_path):
    (message,) = problems(tmp_path, MINIMAL + "training: {pure_bf16: true}\n")
    assert message.startswith("recipe.yaml:4: training.pure_bf16 is not a key of training.")
    assert message.endswith("training.pure_bf16 is not available yet; leave it out.")


def every_key():
    for section, keys in own_keys().items():
        for key in keys:
            yield section, key


def test_every_foreign_name_leads_to_a_key_that_exists():
    ours = {f"{section}.{key}" if section else key for section, key in every_key()}
    assert not LATER & ours
    for name, target in FOREIGN.items():
        assert name not in ours
        if not target.startswith("the launch file"):
            targets = target.replace(" (rows per optimizer step)", "").replace(" or ", " and ").split(" and ")
            assert set(targets) <= ours, name


def test_the_well_known_tools_are_covered():
    assert {"axolotl", "LLaMA-Factory", "torchtune"} <= set(BY_TOOL)
    assert len(FOREIGN) >= 150 and min(len(names) for names in BY_TOOL.values()) >= 20
    for name in SAID_IN_WORDS:
        assert suggest("", name, own_keys()) == SAID_IN_WORDS[name]


@pytest.mark.parametrize("section", ["", "model", "lora", "data", "data.train[]", "training", "evaluation", "logging"])
def test_foreign_names_are_understood_wherever_they_stand(section):
    for name, target in FOREIGN.items():
        if "." not in name:
            assert suggest(section, name, own_keys()) == f"Use {target}."


def test_a_foreign_name_may_mean_something_in_one_section_only():
    for name, target in FOREIGN.items():
        section, _, key = name.rpartition(".")
        assert suggest(section, key, own_keys()) == f"Use {target}."


def test_sections_of_other_tools_are_read_through(tmp_path):
    text = MINIMAL + "optimizer: {_component_: torch.optim.AdamW, lr: 2e-5, weight_decay: 0.1, betas: [0.9, 0.95]}\n"
    (message,) = problems(tmp_path, text)
    assert (
        message == "recipe.yaml:4: optimizer is not a key of a recipe. Use training.optim. Inside it, lr is"
        " training.learning_rate, weight_decay is training.weight_decay, betas is training.adam_beta1 and"
        " training.adam_beta2."
    )
    (message,) = problems(tmp_path, MINIMAL + "peft: {kind: {lora_r: 8, lora_alpha: 16}}\n")
    assert message.endswith("Inside it, lora_r is lora.r, lora_alpha is lora.alpha.")


def test_a_keyword_in_a_list_of_layers_is_refused(tmp_path):
    (message,) = problems(tmp_path, MINIMAL + "lora: {target_modules: [all-linear]}\n")
    assert "lora.target_modules is ['all-linear']; it must be all-linear, or a list of names" in message


def test_a_combination_is_judged_beside_wrong_values(tmp_path):
    text = MINIMAL + "training: {seed: -1}\n"
    found = problems(tmp_path, text.replace("org/model}", "org/model, load_in_4bit: true}"))
    assert len(found) == 2
    assert "recipe.yaml:1: model.load_in_4bit is true, but 4-bit weights cannot be trained" in found[0]


def test_misspelt_keys_get_the_right_key():
    right = total = 0
    for section, key in every_key():
        if len(key) < 4:
            continue
        m = len(key) // 2
        missing, doubled = key[:m] + key[m + 1 :], key[:m] + key[m] + key[m:]
        swapped, dashed = key[: m - 1] + key[m] + key[m - 1] + key[m + 1 :], key.replace("_", "-") + "s"
        for wrong in (missing, doubled, swapped, dashed, key.upper()):
            if wrong not in own_keys()[section]:
                total += 1
                right += suggest(section, wrong, own_keys()) == f"Did you mean {key}?"
    assert total > 150
    assert right / total >= 0.95


def test_keys_in_the_wrong_section_are_sent_to_the_right_one():
    for section, key in every_key():
        for other in ("model", "training", "data"):
            if key not in own_keys()[other] and section != "data.eval[]" and key != "path":
                full = f"{section}.{key}" if section else key
                assert full in suggest(other, key, own_keys()) or key in FOREIGN, (other, key)


def test_every_key_is_documented():
    def models(model):
        yield model
        for field in model.model_fields.values():
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                for inner in (part, *getattr(part, "__args__", ())):
                    if hasattr(inner, "model_fields"):
                        yield from models(inner)

    for model in models(Recipe):
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith("."), (model.__name__, name)
