"""A micro-batch: what one rank takes in one forward, with its counts on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """`inputs` is what the summed-loss module's forward takes; tensors are int64 where nothing else is said.

    - `input_ids` (rows, tokens): padded on the right, or (1, tokens): the samples one after the other (packed).
    - `position_ids` (1, tokens), packed only: 0, 1, ... within each sample.
    - `segment_lengths`, packed only: the tokens of each sample, ints. `cu_seq_lens_q`, `cu_seq_lens_k` (samples + 1,)
      int32 and `max_length_q`, `max_length_k` say the same to flash attention.
    - `predicting` (n,): the positions of input_ids, flattened, whose next token is trained.
    - `targets` (n,): those next tokens.
    """

    inputs: Mapping[str, Any]
    trained_tokens: int  # n
    input_tokens: int  # without padding

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) of input_ids, padding included."""
        rows, tokens = self.inputs["input_ids"].shape
        return rows, tokens

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs."""
        return [value for value in self.inputs.values() if isinstance(value, Tensor)]
