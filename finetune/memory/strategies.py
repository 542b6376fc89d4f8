"""The ways of running a recipe side by side, and the changes that make it fit (mitigations), the cheapest first.

Mitigations are ordered by what they cost: time first, then the hardware's speed, the mathematics last
(docs/memory.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from finetune.launch import compatibility
from finetune.launch.preflight import Resolved
from finetune.launch.strategy import Kind, Strategy, Target
from finetune.memory.micro_batch import largest_that_fits, micro_batches, next_smaller
from finetune.memory.verdict import Outcome, PlanInputs, Scenario, outcome
from finetune.recipe.fields import LoraSection
from finetune.recipe.load import LoadedRecipe
from finetune.report.text import count

# What accelerate_configs/ holds, by (engine, ZeRO stage, optimizer, parameters); tests/commands/test_plan.py reads the
# files.
LAUNCH_FILES = {
    ("single", 0, "none", "none"): "single_gpu.yaml",
    ("ddp", 0, "none", "none"): "multi_gpu.yaml",
    ("deepspeed", 1, "none", "none"): "zero1.yaml",
    ("deepspeed", 2, "none", "none"): "zero2.yaml",
    ("deepspeed", 2, "cpu", "none"): "zero2_offload.yaml",
    ("deepspeed", 3, "none", "none"): "zero3.yaml",
    ("deepspeed", 3, "cpu", "cpu"): "zero3_offload.yaml",
    ("deepspeed", 3, "nvme", "nvme"): "zero3_nvme.yaml",
}
NVME_FOLDER = "/local_nvme"
SMALLER, CHECKPOINTING = "smaller micro-batch", "gradient checkpointing"


def as_configured(inputs: PlanInputs) -> Outcome:
    """The recipe under its launch. An open micro-batch is the largest that fits, or one row."""
    settled, machine = inputs.settled, inputs.machine
    batch = settled.batch
    own = Scenario("this recipe", settled.loaded, settled.strategy, batch.per_device_rows, batch.accumulation_steps)
    if not batch.open or (machine.device_bytes is None and machine.host_bytes is None):
        return outcome(inputs, own)
    return _largest(inputs, own, micro_batches(settled)) or outcome(inputs, own)


def _largest(inputs: PlanInputs, scenario: Scenario, sizes: Sequence[int]) -> Outcome | None:
    """The scenario with the largest of these micro-batches that fits, the global batch as it was; None where not even
    the smallest does.
    """
    known: dict[int, Outcome] = {}

    def fits(rows: int) -> bool:
        known[rows] = outcome(inputs, _with_rows(inputs, scenario, rows))
        return known[rows].fits is True

    if not sizes or not fits(sizes[0]):
        return None
    chosen = largest_that_fits(sizes, fits)
    return known[chosen or sizes[0]]


def _with_rows(inputs: PlanInputs, scenario: Scenario, rows: int) -> Scenario:
    return dataclasses.replace(scenario, rows=rows, steps=-(-inputs.settled.batch.rows_per_rank // rows))


def table(settled: Resolved) -> list[Scenario]:
    """The strategies side by side: every weight trained until LoRA; activations recomputed, and K > 1, from "+
    checkpointing" on.
    """
    base, batch, loaded = settled.strategy, settled.batch, settled.loaded
    rows, steps = batch.per_device_rows, max(2, batch.accumulation_steps)
    whole = batch.rows_per_rank
    kept = with_adapters(recomputing(loaded, False), None)
    full = recomputing(kept, True)
    adapters = loaded.recipe.lora or LoraSection()
    one = plain(base)
    offload = sharded(base, 3, "cpu", "cpu")
    return [
        Scenario("whole batch, K=1", kept, one, whole, 1),
        Scenario("same micro-batch, K=1", kept, one, rows, 1),
        Scenario("accumulation, K>1", kept, one, rows, steps),
        Scenario("+ checkpointing", full, one, rows, steps),
        *(Scenario(f"ZeRO-{stage}", full, sharded(base, stage), rows, steps) for stage in (1, 2, 3)),
        Scenario("ZeRO-3 + CPU offload, K=1", full, offload, rows, 1),
        Scenario("ZeRO-3 + CPU offload, K>1", full, offload, rows, steps),
        Scenario("ZeRO-3 + NVMe offload", full, sharded(base, 3, "nvme", "nvme"), rows, steps),
        Scenario("LoRA", with_adapters(full, adapters), one, rows, steps, True),
        Scenario("QLoRA", with_adapters(full, adapters, four_bits=True), one, rows, steps, True),
    ]


def mitigations(settled: Resolved) -> list[Scenario]:
    """The changes in their order, each with all that those before it changed. `rows` is the recipe's;
    `first_that_fits` finds each one's own.

    Sharding helps only where there are several ranks. LoRA and QLoRA change the mathematics: they come last, and begin
    again at the launch as it was given, because what they leave out is what those before them share and offload.
    """
    loaded, strategy, batch = settled.loaded, settled.strategy, settled.batch
    found: list[Scenario] = []

    def add(name: str, mathematics: bool = False) -> None:
        found.append(Scenario(name, loaded, strategy, batch.per_device_rows, batch.accumulation_steps, mathematics))

    if batch.per_device_rows > 1:
        add(SMALLER)
    if not loaded.recipe.training.gradient_checkpointing:
        loaded = recomputing(loaded, True)
        add(CHECKPOINTING)
    for stage in (2, 3):
        if strategy.ranks > 1 and strategy.zero_stage < stage:
            strategy = sharded(strategy, stage, strategy.offload_optimizer, strategy.offload_param)
            add(f"ZeRO-{stage}")
    if strategy.offload_optimizer == "none":
        strategy = sharded(strategy, max(2, strategy.zero_stage), "cpu")
        add("optimizer offload")
    if strategy.offload_param == "none":
        strategy = sharded(strategy, 3, strategy.offload_optimizer, "cpu")
        add("parameter offload")
    if "nvme" not in (strategy.offload_optimizer, strategy.offload_param):
        strategy = sharded(strategy, 3, "nvme", "nvme")
        add("NVMe offload")
    adapters = settled.loaded.recipe.lora
    if adapters is None:
        loaded, strategy = with_adapters(loaded, adapters := LoraSection()), settled.strategy
        add("LoRA", True)
        if strategy.offload_param == "none":
            strategy = sharded(strategy, 3, "cpu", "cpu")
            add("LoRA with parameter offload", True)
    if not settled.loaded.recipe.model.load_in_4bit:
        loaded, strategy = with_adapters(loaded, adapters, four_bits=True), plain(settled.strategy)
        add("QLoRA", True)
    return found


def fewer_activations(settled: Resolved) -> str:
    """The first mitigation that leaves what is held as it is, in words; "" where none is left. Nothing is estimated."""
    found = [scenario for scenario in mitigations(settled) if scenario.name in (SMALLER, CHECKPOINTING)]
    return _in_words(settled, found[0]) if found else ""


def less_to_hold(settled: Resolved, on_host: bool) -> list[str]:
    """The mitigations, in words, that shrink what is held whatever the micro-batch: weights, gradients, optimizer
    states. On the host without offload, which takes host memory. Nothing is estimated.
    """
    return [
        words
        for scenario in mitigations(settled)
        if scenario.name not in (SMALLER, CHECKPOINTING)
        and not (on_host and "offload" in scenario.name)
        and not compatibility.met(scenario.loaded.recipe, scenario.strategy)
        and (words := _in_words(settled, scenario))
    ]


def _in_words(settled: Resolved, scenario: Scenario) -> str:
    """What a mitigation changes, as an order; "" for those that only go further than the one before."""
    if scenario.name == SMALLER:
        smaller, training = next_smaller(settled.batch), settled.loaded.recipe.training
        assert smaller is not None, "there is no such mitigation for one row"
        if smaller.row_tokens is not None:
            less = f"micro-batches of at most {smaller.micro_batch_size}, the same update"
            if training.per_device_train_batch_size == "auto":
                return f"set training.device_memory to less than what is there: smaller micro-batches, such as {less}"
            return f"set training.per_device_train_batch_size to {smaller.per_device_rows}: {less}"
        steps = smaller.accumulation_steps
        also = f" and training.gradient_accumulation_steps to {steps}"
        return (
            f"set training.per_device_train_batch_size to {smaller.per_device_rows}"
            f"{'' if training.gradient_accumulation_steps == 'auto' else also}: {count(smaller.per_device_rows, 'row')}"
            f" x K={steps} x {count(smaller.ranks, 'rank')} = {smaller.global_batch_rows} rows per step as before, the"
            " same update"
        )
    launch = _launch_in_words(scenario.strategy)
    return {
        CHECKPOINTING: "set training.gradient_checkpointing to true: activations are computed again instead of kept",
        "ZeRO-2": f"{launch}: the ranks share gradients and optimizer states",
        "ZeRO-3": f"{launch}: the ranks share weights, gradients and optimizer states",
        "optimizer offload": f"{launch}: gradients and optimizer states go to host memory",
        "parameter offload": f"{launch}: weights go to host memory, too",
        "LoRA": "train adapters (a lora section)",
        "QLoRA": "hold the base in 4 bits (a lora section and model.load_in_4bit: true)",
    }.get(scenario.name, "")


def _launch_in_words(strategy: Strategy) -> str:
    if file := launch_file_of(strategy):
        return f"launch with accelerate_configs/{file}"
    offload = {"optimizer": strategy.offload_optimizer, "param": strategy.offload_param}
    lines = [f"offload_{what}_device to {target}" for what, target in offload.items() if target != "none"]
    return f"set {' and '.join([f'zero_stage to {strategy.zero_stage}', *lines])} in the launch file"


def first_that_fits(inputs: PlanInputs) -> list[Outcome]:
    """The mitigations that were tried, the last of which is the first that fits, if one does.

    Each takes the largest micro-batch that fits, up to the recipe's; where not one row fits, its outcome is that of one
    row."""
    settled, tried = inputs.settled, []
    sizes = micro_batches(settled)
    for scenario in mitigations(settled):
        most = scenario.rows - (scenario.name == SMALLER)
        allowed = [rows for rows in sizes if settled.batch.open or rows <= most] or [scenario.rows]
        found = _largest(inputs, scenario, allowed)
        tried.append(found or outcome(inputs, _with_rows(inputs, scenario, allowed[0])))
        if found:
            break
    return tried


def nearest(tried: Sequence[Outcome]) -> Outcome | None:
    """Of mitigations that do not fit, the one that misses by least, device and host together."""
    missed = [one for one in tried if one.found is not None]
    return min(missed, key=lambda one: one.over_device_bytes + one.over_host_bytes, default=None)


def plain(strategy: Strategy) -> Strategy:
    """The same ranks without DeepSpeed."""
    engine: Kind = "ddp" if strategy.ranks > 1 else "single"
    return dataclasses.replace(
        strategy, engine=engine, zero_stage=0, offload_optimizer="none", offload_param="none", nvme_path=None
    )


def sharded(strategy: Strategy, stage: int, optimizer: Target = "none", parameters: Target = "none") -> Strategy:
    """The same ranks under ZeRO."""
    folder = (strategy.nvme_path or NVME_FOLDER) if "nvme" in (optimizer, parameters) else None
    return dataclasses.replace(
        strategy,
        engine="deepspeed",
        zero_stage=stage,
        offload_optimizer=optimizer,
        offload_param=parameters,
        nvme_path=folder,
    )


def recomputing(loaded: LoadedRecipe, on: bool) -> LoadedRecipe:
    """The recipe with gradient checkpointing on or off."""
    training = loaded.recipe.training.model_copy(update={"gradient_checkpointing": on})
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"training": training}))


def with_adapters(loaded: LoadedRecipe, lora: LoraSection | None, four_bits: bool = False) -> LoadedRecipe:
    """The recipe with these adapters, or with every weight trained."""
    model = loaded.recipe.model.model_copy(update={"load_in_4bit": four_bits})
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"lora": lora, "model": model}))


def launch_file_of(strategy: Strategy) -> str | None:
    """The shipped launch file of this engine, stage and offload; None where none matches."""
    key = (strategy.engine, strategy.zero_stage, strategy.offload_optimizer, strategy.offload_param)
    return None if strategy.use_cpu else LAUNCH_FILES.get(key)
