"""A rank's bytes under DeepSpeed's ZeRO stages, with optimizer states and parameters on device, host or NVMe.
Torch-free.

Every term is an allocation in DeepSpeed 0.19.8. tests/memory/test_zero.py compares the sums with the storages of real
runs on CPU ranks, where device and host are one memory. What exists only with a GPU (pinned memory rounded up, copies
between host and device, fused kernels) is read in the sources and not measured."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.launch.strategy import Strategy
from finetune.memory.resident import Resident
from finetune.memory.zero.layout import Layout
from finetune.memory.zero.stage_1_2 import stage_1_and_2
from finetune.memory.zero.stage_3 import stage_3
from finetune.model.parameters import Weights


def resident_sharded(
    weights: Weights,
    strategy: Strategy,
    optim: str,
    settings: Mapping[str, int],
    on_cpu: bool,
    accumulates: bool = True,
) -> Resident:
    """The bytes of the rank that has most, by item and place; in `load` and `save` all that is there then.

    `optim` is the recipe's, `settings` those of `derive_settings` or what replaced them, `on_cpu`: no GPU, so that
    nothing is pinned and torch's AdamW is not fused. `accumulates`: windows have more than one micro-batch, and forward
    passes meet gradients."""
    layout = Layout(weights, strategy, optim, settings, on_cpu, accumulates)
    return stage_3(layout) if strategy.zero_stage == 3 else stage_1_and_2(layout)
