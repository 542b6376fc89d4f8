"""A model's parameters one by one, whole also where ZeRO-3 holds shards, and the types that they can have.
Torch-free.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of an element of exported weights, by torch's name
PRECISION_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what a launch's mixed_precision means


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


def frozen_type(model: nn.Module) -> str:
    """The type that most frozen parameters are held in, by torch's name; NF4 where bitsandbytes has packed them; ""
    where none is frozen.
    """
    elements: Counter[str] = Counter()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            packed = getattr(parameter, "quant_state", None) is not None
            elements["NF4" if packed else str(parameter.dtype).removeprefix("torch.")] += parameter_elements(parameter)
    return elements.most_common(1)[0][0] if elements else ""


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, whole also where ZeRO-3 holds only shards of them."""
    trained = total = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)  # two 4-bit weights lie in one byte
        count = parameter_elements(parameter) if packed is None else math.prod(packed.shape)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
