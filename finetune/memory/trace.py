"""The bytes of a training step, traced through the real model, adapters and loss on tensors that take no memory.

A step is what the engine does in one process (finetune/engine/engine.py): forward under autocast, scaled loss,
backward, clipping, optimizer. Where layers repeat, two short models are traced and every moment is continued linearly:
exact, because a layer more adds the same storages each time (tests/memory/test_trace.py compares with whole models).
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from finetune.engine.clipping import clip_on_cpu
from finetune.engine.optimizer import parameter_groups, torch_adamw
from finetune.engine.storages import StorageTracker, pretending, without_padding
from finetune.model.facts import ModelFacts
from finetune.model.outline import outline, outlined, repeated_layers
from finetune.model.parameters import PRECISION_DTYPES, Weights
from finetune.objectives.sft import SummedLoss
from finetune.recipe.load import Loaded

# of which the first or last has the peak: what is alive grows or shrinks by the same from layer to layer
BETWEEN = "layers between"


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows of so many tokens each; `padded` where rows differ in length, which makes attention masks."""

    rows: int
    tokens: int
    padded: bool = True


@dataclass(frozen=True)
class Numbers:
    """How numbers are computed: `precision` of the launch file; `casts`: the engine holds all weights in it (DeepSpeed)
    instead of casting them under autocast; `on_cpu`: which optimizer and clipping run; `adapters_stay`: `casts` does
    not touch adapters (under ZeRO-3, which they meet after zero.Init)."""

    precision: str = "no"
    casts: bool = False
    on_cpu: bool = True
    adapters_stay: bool = False


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
    return (
        "layer"
        if traced_part.startswith("backward")
        else "forward"
        if traced_part.startswith("forward")
        else traced_part
    )


def _most(alive: list[dict[str, int]]) -> int:
    return max(sum(kinds.values()) for kinds in alive)


def profile(loaded: Loaded, facts: ModelFacts, shape: Shape, micro_batches: int, numbers: Numbers) -> Profile:
    """The peaks of a window of `micro_batches` micro-batches of this shape, for the whole model.

    Raises whatever a model's own code raises where it cannot run on fake tensors (routing that depends on values, for
    instance)."""
    whole = outlined(loaded, facts)
    depth, period, weights = whole.layers, whole.period, whole.weights
    short = 2 * period + depth % period
    if short + period < depth and any(weight.layer is not None for weight in weights.all):
        traced = [
            trace(loaded, facts, shape, micro_batches, numbers, layers, period) for layers in (short, short + period)
        ]
        series = continued(*traced, (depth - short) // period)
    else:
        series = trace(loaded, facts, shape, micro_batches, numbers, None, period)
    return Profile(series, weights)


def continued(first: Series, second: Series, times: Fraction | int) -> Series:
    """The series of a model that has `times` periods of layers more than `first`, where `second` has one more.

    Each event of a part of a step is followed by itself. Parts whose events depend on the number of layers (the
    optimizer goes through all parameters) are followed by their peaks."""
    series = {}
    for part, alive in first.items():
        more = second[part]
        if len(alive) != len(more):
            alive, more = ([max(events, key=lambda kinds: sum(kinds.values()))] for events in (alive, more))
        series[part] = [
            {kind: round(a.get(kind, 0) + times * (b.get(kind, 0) - a.get(kind, 0))) for kind in {*a, *b}}
            for a, b in zip(alive, more, strict=True)
        ]
    return series


def trace(
    loaded: Loaded,
    facts: ModelFacts,
    shape: Shape,
    micro_batches: int,
    numbers: Numbers,
    layers: int | None,
    period: int = 1,
) -> Series:
    """What is alive during one window of a model of `layers` layers (None: all of them), after a window that made the
    optimizer's states.
    """
    network = outline(loaded, facts, layers)
    lora, packed = loaded.recipe.lora is not None, loaded.recipe.model.load_in_4bit
    compute = getattr(torch, PRECISION_DTYPES[numbers.precision])
    if numbers.precision != "no" and (numbers.casts or packed):
        # with packed weights bitsandbytes computes with weights of this type, made from them each time
        for parameter in network.parameters():
            if not (parameter.requires_grad and lora and (packed or numbers.adapters_stay)):
                parameter.data = parameter.data.to(compute)
    tracker = StorageTracker(record=True)
    with pretending(), contextlib.nullcontext() if shape.padded else without_padding():
        network.to_empty(device="cpu")
        network.tie_weights()
        module = SummedLoss(network)
        optimizer = _optimizer(network, loaded, numbers)
        batch = {
            name: torch.ones(shape.rows, shape.tokens, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "labels")
        }
        tracker.forget(batch.values())
        with tracker, _watched(network, tracker, period):
            tracker.hold([*network.parameters(), *network.buffers()], "parameters")
            # a step without a backward before it: only to make the optimizer's states
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            _window(module, optimizer, batch, 0, numbers, tracker, loaded.recipe.training.max_grad_norm)
            for parameter in network.parameters():
                tracker.hold(
                    [t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, Tensor)],
                    "optimizer states",
                )
            tracker.series.clear()
            _window(module, optimizer, batch, micro_batches, numbers, tracker, loaded.recipe.training.max_grad_norm)
    return tracker.series


def _window(
    module, optimizer, batch: dict[str, Tensor], micro_batches: int, numbers: Numbers, tracker: StorageTracker, limit
) -> None:
    """What Engine.micro_step does with one process."""
    autocast = numbers.precision != "no" and not numbers.casts
    compute = getattr(torch, PRECISION_DTYPES[numbers.precision]) if autocast else torch.bfloat16
    for _ in range(micro_batches):
        with torch.autocast("cpu", compute, enabled=autocast):
            loss = module(batch)
        (loss * 1.0 / 1.0).backward()
    tracker.kind = "buffers"
    tracker.enter("optimizer step")
    parameters = list(module.parameters())
    clip_on_cpu(parameters, limit) if numbers.on_cpu else nn.utils.clip_grad_norm_(parameters, limit or torch.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(network: nn.Module, loaded: Loaded, numbers: Numbers) -> torch.optim.Optimizer:
    """The recipe's optimizer, where torch has it; 8-bit ones keep their states elsewhere (formulas), and step in place
    as SGD does.
    """
    training = loaded.recipe.training
    if training.optim != "adamw":
        return torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=training.learning_rate)
    return torch_adamw(parameter_groups(network, training), training, fused=not numbers.on_cpu)


@contextlib.contextmanager
def _watched(network: nn.Module, tracker: StorageTracker, period: int) -> Iterator[None]:
    """Tells the tracker which part of a step goes on: the head and the loss, and the backward of the first and last
    layers.
    """
    layers, head = repeated_layers(network), network.get_output_embeddings()
    names = {i: f"layer {i} from below" for i in range(min(period, len(layers)))}
    names |= {
        i: f"layer {len(layers) - 1 - i} from above" for i in range(max(period, len(layers) - period), len(layers))
    }
    in_backward = False

    def begin(part: str, kind: str) -> None:
        tracker.kind = kind
        tracker.enter(part)

    def backward(index: int) -> str:
        return f"backward, {names.get(index, BETWEEN)}" if index >= 0 else "backward, embedding"

    def enter_network(module, args, kwargs) -> None:
        nonlocal in_backward
        in_backward = False
        begin("forward", "activations")

    def enter_head(module, args, kwargs) -> None:
        begin("loss", "logits and loss")
        hidden = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))

        def leave(gradient: Tensor) -> None:
            nonlocal in_backward
            in_backward = True
            begin(backward(len(layers) - 1), "activations")

        if hidden.requires_grad:
            hidden.register_hook(leave)

    def enter_layer(index: int):
        def hook(module, args, kwargs) -> None:
            hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if in_backward:  # recomputed
                begin(backward(index), "activations")
                return
            begin(f"forward, {names.get(index, BETWEEN)}", "activations")
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda gradient: begin(backward(index - 1), "activations"))

        return hook

    def new_gradient(parameter: Tensor) -> None:
        tracker.hold([parameter.grad], "gradients")

    handles = [network.register_forward_pre_hook(enter_network, with_kwargs=True)]
    handles += [head.register_forward_pre_hook(enter_head, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(enter_layer(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [p.register_post_accumulate_grad_hook(new_gradient) for p in network.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
