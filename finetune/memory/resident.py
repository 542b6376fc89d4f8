"""What one rank holds all the time and in each part of a run, by place and item. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What memory is spent on. `buffers`: what engines gather, bucket, pin and swap through; `overhead`: contexts,
# libraries, fragmentation.
ITEMS = ("parameters", "gradients", "optimizer states", "activations", "logits and loss", "buffers", "overhead")


@dataclass(frozen=True)
class Resident:
    """One rank's bytes from the second window on, by item, for each place, without activations and losses.

    `device` and `host` are there all the time. `gathered_bytes`: most of whole parameters on the device at once in
    forward and backward (ZeRO-3). `backward`, `step`, `load`, `save`: what comes on top in these parts, {place: {item:
    bytes}}; of `load` and `save` zero/ says all that is there. On a CPU-only run device and host are one memory: the
    run takes the sum."""

    device: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)
    nvme: Mapping[str, float] = field(default_factory=dict)
    gathered_bytes: float = 0.0
    backward: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    step: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    load: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    save: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
