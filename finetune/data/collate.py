"""Rows to one micro-batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from finetune.data.token_cache import IGNORED, TokenRow


def collate(rows: Sequence[TokenRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One micro-batch: `input_ids`, `attention_mask`, `labels`, int64, shape (rows, tokens), padded on the right.

    The padding is masked by length, never by token id: where pad equals eos the end of a turn is still learned.
    No rows give the empty micro-batch: one row of two padding tokens, attended to, with no trained token.
    """
    width = max([len(row.input_ids) for row in rows], default=2)
    shape = (max(1, len(rows)), width)
    input_ids = np.full(shape, pad_token_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    attention_mask = np.zeros(shape, np.int64) if rows else np.ones(shape, np.int64)
    for i, row in enumerate(rows):
        tokens = len(row.input_ids)
        input_ids[i, :tokens] = row.input_ids
        labels[i, :tokens] = row.labels
        attention_mask[i, :tokens] = 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(labels),
    }
