"""What a run really takes: memory by item at fixed points, and its peaks.

A GPU counts by itself. On the CPU tensors are counted (storages.py), which costs time at every operation: so only while
engine and model are made, and in micro-batches larger than any before in their place in a window. Few are: a new
largest one comes ever more seldom."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from finetune.engine.devices import device_peak_bytes, has_accelerator, host_bytes, host_peak_bytes
from finetune.engine.memory_use import held_by_optimizer, memory_by_category
from finetune.engine.storages import StorageTracker
from finetune.objectives.micro_batch import MicroBatch


@dataclass
class Meter:
    """`points[name]` has bytes by item the first time that point was reached; nothing is measured unless `enabled`."""

    enabled: bool = False
    points: dict[str, dict[str, int]] = field(default_factory=dict)
    module: nn.Module | None = field(default=None, repr=False)  # what is measured, as soon as it is there
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    largest: tuple[int, int] = (0, 0)  # rows, tokens of the largest micro-batch so far
    _tracker: StorageTracker | None = field(default=None, repr=False)
    _windows: int = field(default=0, repr=False)  # that have ended
    _first: bool = field(default=True, repr=False)  # whether the next micro-batch begins one
    _seen: dict[tuple[bool, bool, bool], tuple[int, int]] = field(default_factory=dict, repr=False)

    def point(self, name: str) -> None:
        """Write down what is held at this point of the run, the first time."""
        if not self.enabled or name in self.points or self.module is None:
            return
        device = has_accelerator()
        if self._tracker is not None:
            self._tracker.hold([*self.module.parameters(), *self.module.buffers()], "held")
        found = memory_by_category(self.module.parameters(), self.optimizer, device)
        other = found.pop("other")
        self.points[name] = found | {
            "everything else": other,  # its name in run.json
            "device_bytes": int(torch.accelerator.memory_allocated()) if device else 0,
            "host_bytes": host_bytes(),
            **({"tracked_bytes": self._tracker.live_bytes} if self._tracker else {}),
        }

    @contextlib.contextmanager
    def assembling(self) -> Iterator[None]:
        """While the model is read and the engine made."""
        if self.enabled and not has_accelerator():
            self._tracker = StorageTracker()
        with self._tracker or contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def micro_step(self, batch: MicroBatch, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch, and the step after the `last` one of its window."""
        if not self.enabled or self.module is None or self.optimizer is None:
            yield
            return
        rows, tokens = batch.shape
        if rows * tokens > self.largest[0] * self.largest[1]:
            self.largest = (rows, tokens)
        # gradients of micro-batches before, optimizer states of windows before: engines keep them in different places
        place = (self._first, self._windows > 0, last)
        self._first, self._windows = last, self._windows + last
        # activations grow with the tokens, logits with those that are trained
        size, seen = (rows * tokens, batch.trained_tokens), self._seen.get(place, (0, 0))
        if self._tracker is None or (size[0] <= seen[0] and size[1] <= seen[1]):
            yield
            return
        self._seen[place] = (max(size[0], seen[0]), max(size[1], seen[1]))
        parameters = list(self.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._tracker.forget(batch.tensors)
        self._tracker.hold(
            [*parameters, *self.module.buffers(), *gradients, *held_by_optimizer(parameters, self.optimizer)], "held"
        )
        with self._tracker:
            yield

    def measured(self) -> dict:
        """What was measured so far, for run.json. Bytes; `tracked_peak_bytes` is None where a GPU counts."""
        device = has_accelerator()
        return {
            "points": self.points,
            "device_peak_bytes": device_peak_bytes(),
            "device_reserved_bytes": int(torch.accelerator.max_memory_reserved()) if device else 0,
            "host_peak_bytes": host_peak_bytes(),
            "tracked_peak_bytes": self._tracker.peak_bytes if self._tracker else None,
            "micro_batch": list(self.largest),
        }
