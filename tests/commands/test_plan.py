"""`finetune plan`: its document, the mitigations, what it refuses, and models that cannot be traced."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from finetune.commands import plan
from finetune.commands.cli import app
from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.launch.preflight import resolve
from finetune.launch.strategy import one_process
from finetune.memory import strategies
from finetune.memory.estimate import estimate
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.memory.resident import ITEMS
from finetune.memory.trace import Precision, combined, profile
from finetune.memory.traced import factors
from finetune.model.facts import read_facts
from finetune.recipe.fields import LoraSection
from finetune.recipe.load import load_recipe
from tests.support.launch import ROOT
from tests.support.tiny_models import small_recipe

TOP = [
    "ok",
    "problems",
    "recipe",
    "launch",
    "batch",
    "model",
    "memory",
    "fits",
    "verdict",
    "as_it_stands",
    "strategies",
    "rungs",
    "change",
    "nearest",
    "impossible",
    "offload",
    "links",
    "notes",
]
ROW = [
    "name",
    "engine",
    "zero_stage",
    "offload_optimizer",
    "offload_param",
    "micro_batch_rows",
    "accumulation_steps",
    "changes_mathematics",
    "refused",
    "verdict",
    "fits",
    "over_device_bytes",
    "over_host_bytes",
    "traced",
    "peak",
    "step_bytes",
    "items",
    "device",
    "host",
    "host_total",
    "nvme_total",
    "disk",
    "parts",
]
CHANGE = [*ROW, "recipe_lines", "launch_file", "launch_lines", "command"]
CONFIGS = ROOT / "scripts" / "docs" / "model_configs"


def command(*arguments: object):
    """The command line in this process; stdout and stderr apart."""
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def planned(path: Path, *arguments: object) -> dict:
    """The document, without the process's own stdout that `--json` writes to."""
    words = [str(word) for word in arguments]
    options = {
        name: next((words[i + 1] for i, word in enumerate(words) if word == f"--{name}"), None)
        for name in ("launch", "device-memory", "host-memory", "ranks")
    }
    ranks = options.pop("ranks")
    document = plan.planned(str(path), [word for word in words if "=" in word], *options.values(), ranks and int(ranks))
    return json.loads(json.dumps(document, allow_nan=False))


PADDED, MICRO_BATCH = "data.packing=false", "training.per_device_train_batch_size"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("tiny"), rows=4)


def test_the_document_is_frozen(tiny):
    document = planned(tiny, "--device-memory", "1MiB", "--host-memory", "1TiB")
    assert list(document) == TOP
    for one in [document["as_it_stands"], *document["strategies"], *document["rungs"]]:
        assert list(one) == ROW
        if not one["refused"]:
            assert list(one["items"]) == list(ITEMS) and set(one["device"]) == {"low", "expected", "high"}
    names = [one["name"] for one in document["strategies"]]
    assert names == [
        "whole batch, K=1",
        "same micro-batch, K=1",
        "accumulation, K>1",
        "+ checkpointing",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-3",
        "ZeRO-3 + CPU offload, K=1",
        "ZeRO-3 + CPU offload, K>1",
        "ZeRO-3 + NVMe offload",
        "LoRA",
        "QLoRA",
    ]


def test_the_keys_are_documented():
    page = (ROOT / "docs/memory.md").read_text()
    assert [key for key in {*TOP, *CHANGE} if f"`{key}`" not in page] == []


def test_items_add_up_to_the_expected_peak(tiny):
    document = planned(tiny, "--device-memory", "1GiB")
    for one in document["strategies"]:
        assert one["refused"] or abs(sum(one["items"].values()) - one["device"]["expected"]) < 10


def test_fits_is_true_false_or_unknown(tiny):
    large, small, unknown = (
        planned(tiny, "--device-memory", "40GiB"),
        planned(tiny, "--device-memory", "1MiB"),
        planned(tiny),
    )
    assert (large["fits"], large["verdict"], large["rungs"], large["change"]) == (True, "fits", [], None)
    assert (small["fits"], small["verdict"], small["change"]) == (False, "no", None)
    assert small["nearest"]["over_device_bytes"] == min(one["over_device_bytes"] for one in small["rungs"]) > 0
    assert (unknown["fits"], unknown["verdict"]) == (None, "unknown")
    text = command(tiny)
    assert text.exit_code == 0 and "give --device-memory" in text.stdout
    text = command(tiny, "--device-memory", "1MiB")
    assert (
        text.exit_code == 0 and "None of the known changes makes it fit" in text.stdout and "Nearest: " in text.stdout
    )


@pytest.mark.parametrize(
    "ranks, names",
    [
        (
            1,
            [
                "smaller micro-batch",
                "gradient checkpointing",
                "optimizer offload",
                "parameter offload",
                "NVMe offload",
                "LoRA",
                "LoRA with parameter offload",
                "QLoRA",
            ],
        ),
        (
            2,
            [
                "smaller micro-batch",
                "gradient checkpointing",
                "ZeRO-2",
                "ZeRO-3",
                "optimizer offload",
                "parameter offload",
                "NVMe offload",
                "LoRA",
                "LoRA with parameter offload",
                "QLoRA",
            ],
        ),
    ],
)
def test_mitigations_have_their_order_and_keeps_the_global_batch(tiny, ranks, names):
    options = ("training.gradient_checkpointing=false", "--ranks", ranks, "--device-memory", "1MiB")
    document = planned(tiny, *options)
    assert [one["name"] for one in document["rungs"]] == names
    assert {one["micro_batch_rows"] * one["accumulation_steps"] * ranks for one in document["rungs"]} == {8}
    assert [one["name"] for one in document["rungs"] if one["changes_mathematics"]] == names[-3:]


def test_a_smaller_micro_batch_comes_first_and_its_lines_are_right(tiny, tmp_path):
    need = {
        rows: planned(tiny, PADDED, f"training.per_device_train_batch_size={rows}")["as_it_stands"]["device"][
            "expected"
        ]
        for rows in (1, 2, 4)
    }
    assert need[1] < need[2] < need[4]
    limit = f"{(need[2] + need[4]) / 2 / 2**10:.3f}KiB"
    steps = "training.gradient_accumulation_steps=2"
    document = planned(tiny, PADDED, "training.per_device_train_batch_size=4", steps, "--device-memory", limit)
    change = document["change"]
    assert list(change) == CHANGE
    assert (change["name"], change["micro_batch_rows"], change["accumulation_steps"]) == ("smaller micro-batch", 2, 4)
    assert change["recipe_lines"] == [
        "training:",
        "  per_device_train_batch_size: 2",
        "  gradient_accumulation_steps: 4",
    ]
    assert change["launch_file"] == "accelerate_configs/single_gpu.yaml" and change["launch_lines"] == []
    overrides = [word for word in change["command"].split() if "=" in word]
    again = planned(tiny, PADDED, *overrides, "--device-memory", limit)
    assert again["fits"] is True and again["as_it_stands"]["device"] == change["device"]


def test_an_open_micro_batch_is_the_one_that_training_would_choose(tiny):
    options = ("training.per_device_train_batch_size=auto", "training.gradient_accumulation_steps=auto")
    need = {
        rows: planned(tiny, PADDED, f"training.per_device_train_batch_size={rows}")["as_it_stands"]["device"][
            "expected"
        ]
        for rows in (4, 8)
    }
    document = planned(tiny, *options, f"training.device_memory={need[4] / 2**10 + 1:.3f}KiB")
    assert document["as_it_stands"]["micro_batch_rows"] == 4 and document["batch"]["per_device_rows"] == 4
    assert (
        planned(tiny, *options, "training.device_memory=1MiB", "--device-memory", "8GiB")["as_it_stands"][
            "micro_batch_rows"
        ]
        == 8
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (("--device-memory", "40"), "--device-memory: 40 has no unit; write 40GiB"),
        (("--device-memory", "40G"), "--device-memory: 40G may mean"),
        (("--host-memory", "0GiB"), "--host-memory: 0GiB is less than one byte"),
        (("--ranks", "0"), "--ranks: 0 is no number of ranks"),
        ((PADDED, "--ranks", "3"), "does not divide it"),
    ],
)
def test_bad_input_is_one_message(tiny, options, words):
    done = command(tiny, *options)
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_json_alone_is_on_stdout(tiny, capfd):
    done = command(tiny, "--device-memory", "40", "--json")
    document = json.loads(capfd.readouterr().out)
    assert (
        done.exit_code == 2 and document["ok"] is False and "--device-memory: 40 has no unit" in document["problems"][0]
    )
    done = command(tiny, "--device-memory", "40GiB", "--json")
    assert done.exit_code == 0 and list(json.loads(capfd.readouterr().out)) == TOP


def test_all_that_is_wrong_is_said_at_once(tiny):
    done = command(tiny, "--device-memory", "40", "--host-memory", "x", "--ranks", "-1", "training.optim=adam7")
    assert done.exit_code == 2 and all(
        word in done.stderr for word in ("--device-memory", "--host-memory", "--ranks", "training.optim")
    )


def test_ranks_stand_instead_of_the_launch_files(tiny):
    file = ROOT / "accelerate_configs" / "zero3.yaml"
    document = planned(tiny, "training.per_device_train_batch_size=1", "--launch", file, "--ranks", "2")
    assert document["launch"]["ranks"] == 2 and any(
        "--ranks 2 stands instead of the 8" in note for note in document["notes"]
    )


def test_what_does_not_go_together_is_shown_with_its_reason(tiny):
    document = planned(tiny, "training.optim=adamw_8bit", "--device-memory", "1MiB")
    refused = {one["name"]: one["refused"] for one in document["strategies"] if one["refused"]}
    assert set(refused) == {"ZeRO-3 + CPU offload, K=1", "ZeRO-3 + CPU offload, K>1", "ZeRO-3 + NVMe offload"}
    assert (
        "ZeRO-3 + NVMe offload is not possible: DeepSpeed's CPU Adam"
        in command(tiny, "training.optim=adamw_8bit").stdout
    )
    assert any(one["name"] == "optimizer offload" and one["refused"] for one in document["rungs"])


def test_launch_files_are_what_mitigations_name_them_for():
    for key, name in strategies.LAUNCH_FILES.items():
        found = read_launch_file(ROOT / "accelerate_configs" / name)
        assert (found.engine, found.zero_stage, found.offload_optimizer, found.offload_param) == key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_micro_batches_are_computed_from_three_traces_exactly(tmp_path, family):
    loaded = load_recipe(small_recipe(tmp_path, rows=4, family=family))
    facts = read_facts(loaded)
    for numbers in (Precision("bf16", weights_in_compute_dtype=True), Precision("bf16", on_cpu=False), Precision()):
        places = {(2, 96), (5, 240), (5, 100), (9, 300)}  # rows, positions with logits
        found = {place: profile(loaded, facts, MicroBatchShape(place[0], 48, place[1]), 2, numbers) for place in places}
        wanted = found.pop((9, 300))
        parts = [(factor, found[place].series) for place, factor in factors(list(found), (9, 300))]
        assert combined(parts) == wanted.series


@pytest.fixture
def mixtral(tmp_path) -> Path:
    path = small_recipe(tmp_path, rows=4)
    config = transformers.MixtralConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    return path


def test_a_model_that_cannot_be_traced_is_guessed_widely_and_says_so(mixtral):
    document = planned(mixtral, "--device-memory", "1GiB")
    stands = document["as_it_stands"]
    assert document["model"]["traced"] is False and stands["traced"] is False and stands["items"]["activations"] > 0
    assert (
        "MixtralForCausalLM cannot be traced: activations and losses are by formula, a wide guess"
        in command(mixtral).stdout
    )
    loaded = load_recipe(mixtral)
    facts, strategy = read_facts(loaded), one_process("bf16")
    found = estimate(loaded, facts, strategy, MicroBatchShape(8, 64), 2, on_cpu=False)
    items = found.parts["device"]["loss"]
    dynamic = items["activations"] + items["logits and loss"]
    assert not found.traced and found.device.high > sum(items.values()) + 0.7 * dynamic


def test_a_model_that_cannot_even_be_outlined_is_refused_by_its_key(tiny):
    settled = resolve(load_recipe(tiny), one_process("bf16"))
    # an outline of a frozen base needs one
    facts = dataclasses.replace(read_facts(settled.loaded), export_dtype="no type")
    loaded = strategies.with_adapters(settled.loaded, LoraSection())
    with pytest.raises(UserError, match="model.name_or_path is .* whose memory cannot be estimated"):
        estimate(loaded, facts, settled.strategy, MicroBatchShape(2, 32), 2, on_cpu=False)


def test_an_8b_model_on_one_card_by_its_config_alone():
    name = f"model.name_or_path={CONFIGS / 'llama3.1-8b'}"
    document = planned(
        ROOT / "recipes/llama3.1-8b/full.yaml", name, "--device-memory", "80GiB", "--host-memory", "512GiB"
    )
    rows = {one["name"]: one for one in document["strategies"]}
    assert document["model"]["parameters"] == 8_030_261_248
    copy = 4 * document["model"]["parameters"]  # accumulation keeps one copy of the gradients, and removes none
    assert abs(rows["accumulation, K>1"]["step_bytes"] - rows["same micro-batch, K=1"]["step_bytes"] - copy) < 2**20
    assert (
        rows["+ checkpointing"]["step_bytes"]
        < rows["accumulation, K>1"]["step_bytes"]
        < rows["whole batch, K=1"]["step_bytes"]
    )
    assert document["fits"] is False and document["change"]["name"] == "optimizer offload"
    assert rows["QLoRA"]["items"]["parameters"] < rows["LoRA"]["items"]["parameters"] / 2
    offload = {one["name"]: one for one in document["offload"]}["ZeRO-3 + CPU offload, K>1"]
    shares = [at["seconds_per_micro_batch"] for at in offload["at"]]
    assert shares == sorted(shares, reverse=True), "K spreads what moves once per step"
