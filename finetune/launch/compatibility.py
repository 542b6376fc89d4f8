"""The table of incompatible settings, recipe x launch file; docs/compatibility.md is printed from it. Torch-free.

Rows about the recipe alone stand in finetune/recipe/rules.py.

A row says when it holds, why, and the nearest combination that works. Whoever starts something asks `refusals` first.
"""

from __future__ import annotations

from finetune.launch.strategy import Strategy
from finetune.recipe.fields import Recipe
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.rules import RECIPE_ROWS, Incompatible, value_of

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
FLASH = ("flash_attention_2", "flash_attention_3")

ROWS = (
    Incompatible(
        recipe="model.load_in_4bit: true (QLoRA)",
        launch="ZeRO-3, with or without offload",
        key="model.load_in_4bit",
        holds=lambda recipe, strategy: recipe.model.load_in_4bit and strategy.zero_stage == 3,
        reason="ZeRO-3 splits weights into flat shards, and packed 4-bit weights with their scales are not one",
        instead="use multi_gpu.yaml or zero2.yaml (every GPU holds the 4-bit base), or LoRA without load_in_4bit",
    ),
    Incompatible(
        recipe="training.optim: adamw_8bit or paged_adamw_8bit",
        launch="optimizer offload (cpu or nvme)",
        key="training.optim",
        holds=lambda recipe, strategy: recipe.training.optim in EIGHT_BIT and strategy.offload_optimizer != "none",
        reason="DeepSpeed's CPU Adam keeps 32-bit states, and the 8-bit states live on the GPU",
        instead="use optim: adamw, or a launch file without optimizer offload (zero3.yaml)",
    ),
    Incompatible(
        recipe="model.attn_implementation: flash_attention_2 or flash_attention_3",
        launch="CPU (use_cpu: true, or no GPU)",
        key="model.attn_implementation",
        holds=lambda recipe, strategy: recipe.model.attn_implementation in FLASH and strategy.use_cpu,
        reason="flash attention is a GPU kernel",
        instead="use attn_implementation: auto or sdpa",
    ),
    Incompatible(
        recipe="model.attn_implementation: flex_attention",
        launch="CPU (use_cpu: true, or no GPU)",
        key="model.attn_implementation",
        holds=lambda recipe, strategy: recipe.model.attn_implementation == "flex_attention" and strategy.use_cpu,
        reason="flex attention has no backward on the CPU",
        instead="use attn_implementation: auto or sdpa",
    ),
    Incompatible(
        recipe="model.attn_implementation: flash_attention_2 or flash_attention_3",
        launch="mixed_precision: 'no'",
        key="model.attn_implementation",
        holds=lambda recipe, strategy: (
            recipe.model.attn_implementation in FLASH and strategy.mixed_precision == "no" and not strategy.use_cpu
        ),
        reason="flash attention computes in 16 bits only",
        instead="use mixed_precision: bf16 in the launch file, or attn_implementation: sdpa",
    ),
    Incompatible(
        recipe="lora with model.dtype: float16",
        launch="mixed_precision: 'no'",
        key="model.dtype",
        holds=lambda recipe, strategy: (
            recipe.lora is not None and recipe.model.dtype == "float16" and strategy.mixed_precision == "no"
        ),
        reason="a float16 base then computes in float16 without a loss scaler, and small gradients vanish",
        instead="use model.dtype: bfloat16 or float32, or mixed_precision: bf16 in the launch file",
    ),
    Incompatible(
        recipe="any recipe",
        launch="mixed_precision: fp16 on the CPU",
        key=None,
        holds=lambda recipe, strategy: strategy.mixed_precision == "fp16" and strategy.use_cpu,
        reason="fp16 needs a loss scaler, which does not run on the CPU",
        instead="use mixed_precision: bf16, or 'no' with quotes",
    ),
)


def met(recipe: Recipe, strategy: Strategy) -> list[Incompatible]:
    """The rows that this recipe and this launch meet; none when the two are compatible."""
    return [row for row in ROWS if row.holds(recipe, strategy)]


def refusals(loaded: LoadedRecipe, strategy: Strategy) -> list[str]:
    """A sentence for every row that is met."""
    return [_sentence(row, loaded, strategy) for row in met(loaded.recipe, strategy)]


def _sentence(row: Incompatible, loaded: LoadedRecipe, strategy: Strategy) -> str:
    if row.key is None:
        return f"{strategy.source}: {row.launch}: {row.reason}. {row.instead.capitalize()}."
    value = value_of(loaded.recipe, row.key)
    return (
        f"{loaded.location(row.key)}: {row.key} is {value}, which is not supported with {row.launch}"
        f" ({strategy.source}): {row.reason}. {row.instead[0].upper()}{row.instead[1:]}."
    )


def table() -> str:
    """The table as Markdown."""
    lines = ["| recipe | launch file | why not | instead |", "|---|---|---|---|"]
    lines += [f"| {row.recipe} | {row.launch} | {row.reason} | {row.instead} |" for row in (*RECIPE_ROWS, *ROWS)]
    return "\n".join(lines) + "\n"
