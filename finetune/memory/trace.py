"""The bytes of a training step, traced through the real model, adapters and loss on tensors that take no memory.

A step is what the engine does in one process (finetune/engine/engine.py): forward under autocast, scaled loss,
backward, clipping, optimizer. Where layers repeat, two short models are traced and every moment is continued linearly:
exact, because a layer more adds the same storages each time (tests/memory/test_trace.py compares with whole models).
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from finetune.engine.clipping import clip_on_cpu
from finetune.engine.optimizer import parameter_groups, torch_adamw
from finetune.engine.storages import StorageTracker, pretending
from finetune.memory.micro_batch_shape import MicroBatchShape
from finetune.model.facts import ModelFacts
from finetune.model.load import objective_for
from finetune.model.outline import outline, outlined, repeated_layers
from finetune.model.parameters import PRECISION_DTYPES, Weights
from finetune.objectives.micro_batch import MicroBatch
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import LoadedRecipe

# of which the first or last has the peak: what is alive grows or shrinks by the same from layer to layer
BETWEEN = "layers between"


@dataclass(frozen=True)
class Precision:
    """How the engine computes: `mixed_precision` as in the launch file. `weights_in_compute_dtype`: all weights are
    held in that type (DeepSpeed) instead of cast under autocast; `fp32_adapters`: adapters are not (under ZeRO-3, where
    they are made after zero.Init). `on_cpu`: which optimizer and clipping run."""

    mixed_precision: str = "no"
    weights_in_compute_dtype: bool = False
    on_cpu: bool = True
    fp32_adapters: bool = False

    @property
    def autocast(self) -> bool:
        return self.mixed_precision != "no" and not self.weights_in_compute_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, PRECISION_DTYPES[self.mixed_precision])
        return dtype


Series = dict[str, list[dict[str, int]]]  # of each part of a window, the bytes alive by kind, whenever they grew


@dataclass(frozen=True)
class Profile:
    """What is alive in each part of a window, from the second window on; and the parameters of the whole model."""

    series: Series
    weights: Weights

    @property
    def peak(self) -> str:
        """The part that sets the peak."""
        return max(self.series, key=lambda part: _most(self.series[part]))

    @property
    def peak_bytes(self) -> int:
        return _most(self.series[self.peak])

    def most(self, part: str, kinds: Container[str]) -> dict[str, int]:
        """What is alive of these kinds when it is most, in the parts that belong to this part of the run
        (`part_of`).
        """
        chosen = [
            {kind: size for kind, size in alive.items() if kind in kinds}
            for name, series in self.series.items()
            if part_of(name) == part
            for alive in series
        ]
        return max(chosen, key=lambda alive: sum(alive.values()), default={})


def part_of(traced_part: str) -> str:
    """The part of the run that a traced part belongs to: forward, loss, layer (the backward) or optimizer step."""
    return "layer" if traced_part.startswith("backward") else traced_part.partition(",")[0]


def _most(alive: list[dict[str, int]]) -> int:
    return max(sum(kinds.values()) for kinds in alive)


def profile(
    loaded: LoadedRecipe, facts: ModelFacts, shape: MicroBatchShape, micro_batches: int, precision: Precision
) -> Profile:
    """The peaks of a window of `micro_batches` micro-batches of this shape, for the whole model.

    Raises whatever a model's own code raises where it cannot run on fake tensors (routing that depends on values, for
    instance)."""
    whole = outlined(loaded, facts)
    depth, period, weights = whole.layers, whole.period, whole.weights
    short = 2 * period + depth % period
    if short + period < depth and any(weight.layer is not None for weight in weights.all):
        first, second = (
            trace(loaded, facts, shape, micro_batches, precision, layers, period) for layers in (short, short + period)
        )
        periods = (depth - short) // period
        series = combined([(1 - periods, first), (periods, second)])
    else:
        series = trace(loaded, facts, shape, micro_batches, precision, None, period)
    return Profile(series, weights)


def combined(parts: Sequence[tuple[Fraction | int, Series]]) -> Series:
    """The series of a step in which every size is this sum of those in others, `parts` as (factor, series); the factors
    add up to 1. A model of `n` more periods of layers than a first one, for instance, has 1 - n times its sizes and n
    times those of the model with one period more.

    Each event of a part of a step is followed by itself. Parts whose events depend on the number of layers (the
    optimizer goes through all parameters) are followed by their peaks."""
    series = {}
    for part in parts[0][1]:
        events = [one[part] for _, one in parts]
        if len({len(one) for one in events}) > 1:
            events = [[max(one, key=lambda kinds: sum(kinds.values()))] for one in events]
        series[part] = [
            {
                kind: round(sum(factor * kinds.get(kind, 0) for (factor, _), kinds in zip(parts, moment, strict=True)))
                for kind in {kind for kinds in moment for kind in kinds}
            }
            for moment in zip(*events, strict=True)
        ]
    return series


def trace(
    loaded: LoadedRecipe,
    facts: ModelFacts,
    shape: MicroBatchShape,
    micro_batches: int,
    precision: Precision,
    layers: int | None,
    period: int = 1,
) -> Series:
    """What is alive during one window of a model of `layers` layers (None: all of them), after a window that made the
    optimizer's states.
    """
    network = outline(loaded, facts, layers)
    lora, packed = loaded.recipe.lora is not None, loaded.recipe.model.load_in_4bit
    if precision.mixed_precision != "no" and (precision.weights_in_compute_dtype or packed):
        # with packed weights bitsandbytes computes with weights of this type, made from them each time
        for parameter in network.parameters():
            if not (parameter.requires_grad and lora and (packed or precision.fp32_adapters)):
                parameter.data = parameter.data.to(precision.compute_dtype)
    tracker = StorageTracker(record=True)
    with pretending():
        network.to_empty(device="cpu")
        network.tie_weights()
        module = SummedLoss(network, objective_for(network, facts))
        optimizer = _optimizer(network, loaded, precision)
        batch = shape.micro_batch()
        tracker.forget(batch.tensors)
        with tracker, StepParts(network, tracker, period).watched():
            tracker.hold([*network.parameters(), *network.buffers()], "parameters")
            # a step without a backward before it: only to make the optimizer's states
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            _window(module, optimizer, batch, 0, precision, tracker, loaded.recipe.training.max_grad_norm)
            for parameter in network.parameters():
                tracker.hold(
                    [t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, Tensor)],
                    "optimizer states",
                )
            tracker.series.clear()
            _window(module, optimizer, batch, micro_batches, precision, tracker, loaded.recipe.training.max_grad_norm)
    return tracker.series


def _window(
    module: SummedLoss,
    optimizer: torch.optim.Optimizer,
    batch: MicroBatch,
    micro_batches: int,
    precision: Precision,
    tracker: StorageTracker,
    limit: float,
) -> None:
    """What Engine.micro_step does with one process."""
    compute = precision.compute_dtype if precision.autocast else torch.bfloat16  # autocast warns about float32
    for _ in range(micro_batches):
        with torch.autocast("cpu", compute, enabled=precision.autocast):
            loss = module(batch.inputs)
        (loss * 1.0 / 1.0).backward()
        del loss
    tracker.kind = "buffers"
    tracker.enter("optimizer step")
    parameters = list(module.parameters())
    clip_on_cpu(parameters, limit) if precision.on_cpu else nn.utils.clip_grad_norm_(parameters, limit or torch.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(network: nn.Module, loaded: LoadedRecipe, precision: Precision) -> torch.optim.Optimizer:
    """The recipe's optimizer, where torch has it; 8-bit ones keep their states elsewhere (formulas), and step in place
    as SGD does.
    """
    training = loaded.recipe.training
    if training.optim != "adamw":
        return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=training.learning_rate)
    return torch_adamw(parameter_groups(network, training), training)


class StepParts:
    """Tells a tracker which part of a step goes on: the forward and backward of the first and last layers, the head
    with the loss. Backward parts begin with the gradient of what went into a layer (tensor hooks), or with the layer's
    forward where it is recomputed."""

    def __init__(self, network: nn.Module, tracker: StorageTracker, period: int):
        self.network, self.tracker, self.in_backward = network, tracker, False
        self.layers = repeated_layers(network)
        count = len(self.layers)
        self.names = {i: f"layer {i} from below" for i in range(min(period, count))}
        self.names |= {i: f"layer {count - 1 - i} from above" for i in range(max(period, count - period), count)}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks on the network while active."""
        head, trained = self.network.get_output_embeddings(), [p for p in self.network.parameters() if p.requires_grad]
        handles = [self.network.register_forward_pre_hook(self.enter_network)]
        handles += [head.register_forward_pre_hook(self.enter_head, with_kwargs=True)]
        handles += [
            layer.register_forward_pre_hook(partial(self.enter_layer, index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        handles += [p.register_post_accumulate_grad_hook(self.new_gradient) for p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter_network(self, module: nn.Module, args: tuple) -> None:
        self.in_backward = False
        self._begin("forward", "activations")

    def enter_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.in_backward:  # recomputed
            self._begin_backward(index)
            return
        self._begin(f"forward, {self.names.get(index, BETWEEN)}", "activations")
        hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._begin_backward(index - 1))

    def enter_head(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._begin("loss", "logits and loss")
        hidden = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._begin_backward(len(self.layers) - 1))

    def new_gradient(self, parameter: Tensor) -> None:
        self.tracker.hold([parameter.grad], "gradients")

    def _begin_backward(self, index: int) -> None:
        self.in_backward = True
        self._begin(
            f"backward, {self.names.get(index, BETWEEN)}" if index >= 0 else "backward, embedding", "activations"
        )

    def _begin(self, part: str, kind: str) -> None:
        self.tracker.kind = kind
        self.tracker.enter(part)
