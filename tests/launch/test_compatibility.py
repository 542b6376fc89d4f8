"""The table of what does not go together: every row is reached, says why, and its way out works."""

import dataclasses

import pytest

from finetune.launch import compatibility
from finetune.launch.preflight import resolve
from finetune.launch.strategy import Strategy
from finetune.recipe.load import load_recipe

MINIMAL = "model: {name_or_path: org/model}\ndata: {train: [{path: org/rows}]}\noutput_dir: x\n"
GPU = Strategy("gpu.yaml", "ddp", 2, 1, "bf16", False)
CPU = Strategy("cpu.yaml", "single", 1, 1, "no", True)
ZERO3 = dataclasses.replace(GPU, source="zero3.yaml", engine="deepspeed", zero_stage=3)
OFFLOAD = dataclasses.replace(ZERO3, source="offload.yaml", offload_optimizer="cpu", offload_param="cpu")
NO_16_BIT = dataclasses.replace(GPU, mixed_precision="no")
QLORA = ("lora.r=4", "model.load_in_4bit=true")

REFUSED = [  # overrides, strategy, what the message says; then a neighbour that works
    (QLORA, ZERO3, "model.load_in_4bit is true, which is not supported with ZeRO-3", QLORA, GPU),
    (QLORA, OFFLOAD, "(offload.yaml)", ("lora.r=4",), OFFLOAD),
    (("training.optim=adamw_8bit",), OFFLOAD, "training.optim is adamw_8bit", ("training.optim=adamw",), OFFLOAD),
    (("training.optim=adamw_bnb_paged_8bit",), OFFLOAD, "is paged_adamw_8bit", ("training.optim=adamw_8bit",), ZERO3),
    (("model.attn_implementation=flash_attention_2",), CPU, "GPU kernel", ("model.attn_implementation=sdpa",), CPU),
    (
        ("model.attn_implementation=flex_attention",),
        CPU,
        "no backward",
        ("model.attn_implementation=flex_attention",),
        GPU,
    ),
    (
        ("model.attn_implementation=flash_attention_3",),
        NO_16_BIT,
        "16 bits",
        ("model.attn_implementation=flash_attention_3",),
        GPU,
    ),
    (("lora.r=4", "model.dtype=float16"), NO_16_BIT, "loss scaler", ("lora.r=4", "model.dtype=bfloat16"), NO_16_BIT),
    ((), dataclasses.replace(CPU, mixed_precision="fp16"), "cpu.yaml: mixed_precision: fp16 on the CPU", (), CPU),
]


@pytest.fixture
def recipe(tmp_path):
    def make(overrides):
        (tmp_path / "recipe.yaml").write_text(MINIMAL)
        return load_recipe(tmp_path / "recipe.yaml", [*overrides, "training.per_device_train_batch_size=1"])

    return make


@pytest.mark.parametrize(("overrides", "strategy", "words", "mended", "with_strategy"), REFUSED)
def test_refused_with_the_reason_and_the_neighbour_works(recipe, overrides, strategy, words, mended, with_strategy):
    (message,) = compatibility.refusals(recipe(overrides), strategy)
    assert words in message and strategy.source in message
    assert message.startswith("command line: ") or not overrides
    resolve(recipe(mended), with_strategy)


def test_every_row_of_the_table_is_reached(recipe):
    reached = {
        row
        for overrides, strategy, *_ in REFUSED
        for row in compatibility.ROWS
        if row.holds(recipe(overrides).recipe, strategy)
    }
    assert reached == set(compatibility.ROWS)


def test_all_problems_of_a_combination_come_at_once(recipe):
    strategy = dataclasses.replace(OFFLOAD, ranks=3, gradient_clipping=2.0)
    with pytest.raises(Exception) as caught:
        resolve(recipe([*QLORA, "training.optim=adamw_8bit", "data.packing=false"]), strategy)
    assert [m.partition(": ")[2].split(" ")[0] for m in caught.value.messages] == [
        "model.load_in_4bit",
        "training.optim",
        "training.global_batch_size",
    ]


def test_the_launch_files_clipping_is_taken_where_the_recipe_is_silent(recipe):
    settled = resolve(recipe([]), dataclasses.replace(ZERO3, gradient_clipping=2.0))
    assert settled.max_grad_norm == 2.0 and settled.batch.accumulation_steps == 32
