"""Squared norms of single micro-batches' gradients, taken before the engine adds them up, averages and shards them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MicroBatchGradNorms:
    """Tensor hooks on the trained parameters of a prepared module for the length of one window.

    A hook gets a micro-batch's whole gradient of its parameter, before DDP reduces or ZeRO partitions it. Sums stay on
    the device: nothing waits for it until the window's end."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device, factor: float):
        """`factor` is what the engine multiplies a summed loss with before its backward."""
        self.factor = factor
        self.weighted_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.micro_batches = 0
        self._squares = torch.zeros_like(self.weighted_squares)
        self._hooks = [p.register_hook(self._see) for p in parameters if p.requires_grad]

    def _see(self, gradient: Tensor) -> None:
        # short sums in float32, then float64: as in the engine's norm
        norms = torch.linalg.vector_norm(torch.atleast_1d(gradient), dim=-1, dtype=torch.float32)
        self._squares += norms.double().square().sum()

    def end_micro_batch(self, tokens: int) -> None:
        """Add tokens x |gradient of the micro-batch's mean loss|^2 to `weighted_squares`; an empty micro-batch adds
        nothing.
        """
        if tokens:
            self.weighted_squares += self._squares / (tokens * self.factor**2)
            self.micro_batches += 1
        self._squares.zero_()

    def close(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()
