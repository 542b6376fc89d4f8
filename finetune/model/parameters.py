"""What the memory arithmetic knows of a model: its parameters, one by one, and the bytes of one rank by item.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# What memory is spent on. `buffers`: what engines gather, bucket, pin and swap through; `overhead`: contexts,
# libraries, fragmentation.
ITEMS = ("parameters", "gradients", "optimizer states", "activations", "logits and loss", "buffers", "overhead")
PLACES = ("device", "host", "nvme", "checkpoint disk")


@dataclass(frozen=True)
class Weight:
    """One parameter. `bytes_each` is what an element takes where no engine casts it: 4 for trained float32, 2 for a
    frozen bf16 one, about 0.52 in NF4 (then `quantised`)."""

    name: str
    elements: int
    trained: bool
    bytes_each: float
    layer: int | None = None  # of the repeated layers, counted from 0; None for embeddings, the last norm and the head
    quantised: bool = False


@dataclass(frozen=True)
class Weights:
    """A model's parameters in their order (tied ones once), and the bytes of its buffers."""

    all: tuple[Weight, ...]
    buffers_bytes: int = 0

    @property
    def elements(self) -> int:
        return sum(weight.elements for weight in self.all)

    @property
    def trained_elements(self) -> int:
        return sum(weight.elements for weight in self.all if weight.trained)

    @property
    def bytes(self) -> float:
        """Where no engine casts or shards."""
        return sum(weight.elements * weight.bytes_each for weight in self.all)

    @property
    def largest_elements(self) -> int:
        return max(weight.elements for weight in self.all)

    @property
    def layer_elements(self) -> int:
        """Elements of the largest repeated layer; of everything where no layer is known."""
        sums: dict[int, int] = {}
        for weight in self.all:
            if weight.layer is not None:
                sums[weight.layer] = sums.get(weight.layer, 0) + weight.elements
        return max(sums.values(), default=self.elements)


@dataclass(frozen=True)
class Resident:
    """One rank's bytes from the second window on, by item, for each place, without activations and losses.

    `device` and `host` are there all the time. `gathered_bytes`: most of whole parameters on the device at once in
    forward and backward (ZeRO-3). `backward`, `step`, `load`, `save`: what comes on top in these parts, {place: {item:
    bytes}}; of `load` and `save` zero.py says all that is there. On a CPU-only run device and host are one memory: the
    run takes the sum."""

    device: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)
    nvme: Mapping[str, float] = field(default_factory=dict)
    gathered_bytes: float = 0.0
    backward: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    step: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    load: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    save: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def weights_of(module: nn.Module) -> Weights:
    """The parameters of a module, whole also where ZeRO-3 holds shards."""
    return Weights(
        tuple(
            Weight(name, parameter_elements(p), p.requires_grad, p.element_size())
            for name, p in module.named_parameters()
        )
    )


def parameter_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 holds only a shard."""
    return getattr(parameter, "ds_numel", parameter.numel())


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 holds only a shard."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
