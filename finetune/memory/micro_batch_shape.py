"""The shape of a micro-batch: all that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.objectives.micro_batch import MicroBatch


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch: rows of so many tokens each, padding included; packed it is one row of samples of
    `segment_lengths`. `trained` positions have logits; None: all.
    """

    rows: int
    tokens: int
    trained: int | None = None
    segment_lengths: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.tokens

    @property
    def predicting(self) -> int:
        """Positions that have logits."""
        return self.positions if self.trained is None else self.trained

    def micro_batch(self) -> MicroBatch:
        """A micro-batch of this shape, whatever its tokens."""
        inputs: dict[str, Any] = {"input_ids": torch.ones(self.rows, self.tokens, dtype=torch.long)}
        inputs |= {name: torch.arange(self.predicting) for name in ("predicting", "targets")}
        if self.segment_lengths:
            positions = [torch.arange(length) for length in self.segment_lengths]
            inputs |= {"position_ids": torch.cat(positions)[None], "segment_lengths": self.segment_lengths}
        return MicroBatch(inputs, self.predicting, self.positions)
