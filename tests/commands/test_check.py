"""`finetune check`: a broken recipe is answered at once, a good one is followed down to a sample of its data."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.commands.check import check
from finetune.errors import UserError
from finetune.launch.preflight import advice, first_stage
from tests.support.tiny_models import small_recipe

ROOT = Path(__file__).resolve().parents[2]
PADDED = "data.packing=false"
BROKEN = "model: {name_or_path: org/model}\ntraining: {sede: 1, cutoff_len: 3}\n"
SAY_WHAT_WAS_IMPORTED = """
import sys
from finetune.commands.cli import main
try:
    main()
finally:
    print([m for m in ("torch", "transformers", "datasets", "accelerate", "deepspeed") if m in sys.modules])
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return small_recipe(tmp_path / "job")


def command(*arguments, code=None):
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "finetune"]
    return subprocess.run([*start, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["check", "train"])
def test_a_broken_recipe_is_answered_in_two_cpu_seconds_without_torch(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(BROKEN)
    (tmp_path / "launch.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    arguments = (name, tmp_path / "recipe.yaml", "lora.rank=3", "--launch", tmp_path / "launch.yaml")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*arguments, code=SAY_WHAT_WAS_IMPORTED)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stdout.strip() == "[]"
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_seconds < 2, "measured 0.5 on an idle machine"
    for words in (
        "recipe.yaml: data is missing",
        "recipe.yaml:2: training.sede",
        "Use data.max_length.",
        "command line: lora.rank is not a key of lora. Use lora.r.",
        "launch.yaml:1: distributed_type",
    ):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_good_recipe_is_summarised(recipe, capsys):
    check(str(recipe), [], None)
    said = capsys.readouterr().out
    for words in (
        "recipe.yaml: OK",
        "LlamaForCausalLM, 448 token ids",
        "40 rows, ",
        "longest row",
        "; 5 steps",
        "8 rows per optimizer step over 1 rank, packed into micro-batches of at most 128 tokens",
        "one process, no mixed precision (no launch file was given",
    ):
        assert words in said
    assert not (recipe.parent / "run").exists()


def test_a_launch_file_changes_the_arithmetic(recipe, capsys):
    check(str(recipe), ["training.global_batch_size=32", PADDED], str(ROOT / "accelerate_configs" / "zero2.yaml"))
    said = capsys.readouterr().out
    assert "x K=2 micro-batches x 8 ranks" in said and "DeepSpeed ZeRO-2, 8 ranks, bf16" in said
    with pytest.raises(UserError, match="does not divide it"):
        check(str(recipe), [PADDED], str(ROOT / "accelerate_configs" / "zero2.yaml"))


def test_the_learning_rate_is_shown_with_its_scaling(recipe, capsys):
    check(str(recipe), [], None)
    assert "  schedule   learning rate 0.01, cosine" in capsys.readouterr().out
    overrides = ["training.learning_rate=2e-4", "training.lr_scaling=sqrt", "training.reference_batch_size=2"]
    check(str(recipe), overrides, None)
    assert "  schedule   learning rate 2e-4 x sqrt(8/2) = 4e-4, cosine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lr_scaling=sqrt", "command line: training.lr_scaling is sqrt, but nothing says which batch"),
        ("training.reference_batch_size=4", "training.reference_batch_size is 4, but it does nothing without"),
    ],
)
def test_lr_scaling_and_its_reference_need_each_other(recipe, override, words):
    with pytest.raises(UserError, match=words):
        check(str(recipe), [override], None)


def test_many_micro_batches_without_clipping_are_warned_about_in_one_line(recipe, capsys):
    many = ["training.global_batch_size=34", "training.per_device_train_batch_size=2", "training.max_grad_norm=0"]
    check(str(recipe), many, None)
    warning = capsys.readouterr().out.splitlines()[-1]
    assert warning.startswith(
        "warning: command line: training.max_grad_norm is 0, so nothing clips the gradient of K=17 "
    )
    for fewer in ("training.global_batch_size=32", "training.max_grad_norm=1.0"):
        settled = first_stage(str(recipe), [o for o in many if not o.startswith(fewer.split("=")[0])] + [fewer], None)
        assert advice(settled.loaded, settled.batch, settled.max_grad_norm) == []


def test_a_batch_that_grows_is_shown_with_its_k(recipe, capsys):
    grows = ["accumulation.schedule=warmup", "accumulation.warmup=[[0.5, 0.25], [1, 1]]", PADDED]
    check(str(recipe), grows, None)
    said = capsys.readouterr().out
    # 40 rows: ten windows of 2, then 8, 8 and 4
    assert "x 1 rank; 2 rows (K=1) until 0.5 of the run, 8 rows (K=4) until 1 of the run; 13 steps" in said


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[[0.5, 0.1], [0.5, 1.0]]", r"accumulation.warmup is \[\[0.5, 0.1\], \[0.5, 1.0\]\], but .* must rise"),
        ("[[0.5, 0.1]]", "the last one is 1.0"),
        ("[]", "it must be a list of pairs of numbers above 0"),
        ("[[0.5, 0], [1, 1]]", "it must be a list of pairs of numbers above 0"),
        ("[0, 2, 4]", "or a list of whole numbers of at least 1"),
        ("[[0.5], [1, 1]]", "it must be a list of pairs of numbers above 0"),
        ("3", "it must be a list of pairs of numbers above 0"),
    ],
)
def test_stages_of_the_batch_are_checked(recipe, value, words):
    with pytest.raises(UserError, match=words):
        first_stage(str(recipe), ["accumulation.schedule=warmup", f"accumulation.warmup={value}"], None)


def test_a_list_of_k_needs_epochs(recipe):
    listed = ["accumulation.schedule=warmup", "accumulation.warmup=[2, 4]"]
    first_stage(str(recipe), listed, None)
    with pytest.raises(UserError, match="accumulation.warmup is .2, 4., but with training.max_steps nothing says when"):
        first_stage(str(recipe), [*listed, "training.max_steps=4"], None)


def test_stages_without_a_schedule_and_unknown_schedules_are_refused(recipe):
    with pytest.raises(UserError, match="it does nothing without accumulation.schedule: add schedule: warmup"):
        first_stage(str(recipe), ["accumulation.warmup=[[1.0, 0.5]]"], None)
    with pytest.raises(UserError, match="accumulation.schedule is 'linear'; it must be constant, warmup or adaptive"):
        first_stage(str(recipe), ["accumulation.schedule=linear"], None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["accumulation.largest=8"],
            "accumulation.largest is 8.0, but it does nothing without accumulation.schedule: adaptive",
        ),
        (
            ["accumulation={schedule: adaptive, smallest: 0.6, largest: 1.5}"],
            "none but 1 lies between smallest and largest",
        ),
        (["accumulation={schedule: adaptive, smallest: 2}"], "accumulation.smallest is 2"),
        (
            ["accumulation={schedule: adaptive}", PADDED],
            "the smallest batch is 2 rows, one micro-batch. .*Use smallest 0.5",
        ),
        (
            ["accumulation={schedule: adaptive}", PADDED, "training.per_device_train_batch_size=8"],
            "Use a smaller micro-batch",
        ),
    ],
)
def test_an_adaptive_batch_needs_sizes_between_which_it_can_measure(recipe, overrides, words):
    with pytest.raises(UserError, match=words):
        first_stage(str(recipe), overrides, None)


def test_an_adaptive_batch_is_planned_with_its_limits(recipe, capsys):
    check(str(recipe), ["accumulation={schedule: adaptive, smallest: 0.5, largest: 8}", PADDED], None)
    assert (
        "then 4 rows (K=2) to 64 rows (K=32) by the gradient noise scale, measured every 5 windows"
        in capsys.readouterr().out
    )


def test_scaling_is_switched_off_by_its_name_alone(recipe):
    first_stage(str(recipe), ["training.reference_batch_size=4", "training.lr_scaling=none"], None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name_or_path=.", "command line: model.name_or_path"),
        ("data.max_length=4096", "fine"),
        ("data.max_length=2", "cannot be trained on"),
    ],
)
def test_model_tokenizer_and_data_are_looked_at(recipe, capsys, monkeypatch, override, words):
    monkeypatch.chdir(recipe.parent)
    try:
        check("recipe.yaml", [override], None)
        said = capsys.readouterr().out
    except UserError as error:
        said = str(error)
    assert words in said


def test_only_a_sample_of_a_large_data_set_is_read(recipe, capsys, monkeypatch):
    monkeypatch.setattr("finetune.commands.check_document.SAMPLE_ROWS", 20)
    check(str(recipe), [], None)
    assert "a sample of 16 rows" in capsys.readouterr().out
    check(str(recipe), ["data.max_rows=10", "training.max_steps=7"], None)
    said = capsys.readouterr().out
    assert "  data       8 rows" in said and "; 7 steps" in said


def test_json_is_one_document_on_stdout(recipe):
    good = command("check", recipe, "--json")
    document = json.loads(good.stdout)
    assert good.returncode == 0
    assert set(document) == {"ok", "problems", "recipe", "launch", "batch", "warnings", "model", "tokenizer", "data"}
    assert document["ok"] and document["data"]["planned_steps"] == 5 and document["launch"]["ranks"] == 1
    sharded = command(
        "check", recipe, "--launch", ROOT / "accelerate_configs" / "zero3_offload_cpu_2_ranks.yaml", "--json"
    )
    settings = json.loads(sharded.stdout)["deepspeed"]
    assert settings["sub_group_size"] == 100_000_000 and settings["offload_param.pin_memory"] is True
    bad = command("check", recipe, "training.sede=1", "--json")
    document = json.loads(bad.stdout)
    assert bad.returncode == 2 and not document["ok"]
    assert document["problems"] == ["command line: training.sede is not a key of training. Did you mean seed?"]
    assert document["problems"][0] in bad.stderr


def test_every_source_is_sampled_and_named_by_its_own_line(recipe, capsys):
    bad = recipe.parent / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n{"mess\n')
    sources = f"[{{path: {recipe.parent / 'chat.jsonl'}}},\n         {{path: {bad}}}]"
    text = recipe.read_text().replace(f"[{{path: {recipe.parent / 'chat.jsonl'}}}]", sources)
    recipe.write_text(text)
    with pytest.raises(UserError, match=r"bad.jsonl:2: "):
        check(str(recipe), ["data.eval_fraction=0.5"], None)
    bad.write_text("")
    with pytest.raises(UserError, match=r"recipe.yaml:4: data.train"):
        check(str(recipe), [], None)
    assert capsys.readouterr().out == ""
