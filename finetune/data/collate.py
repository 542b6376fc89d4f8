"""Rows to one micro-batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from finetune.data.token_cache import IGNORED, TokenRow
from finetune.objectives.micro_batch import MicroBatch


def padded(rows: Sequence[TokenRow], pad_token_id: int) -> MicroBatch:
    """Rows below each other, (rows, tokens), padded on the right.

    What is padding is known by length, never by token id: where pad equals eos the end of a turn is still learned. No
    rows give the empty micro-batch: one row of two padding tokens, with no trained token.
    """
    width = max([len(row.input_ids) for row in rows], default=2)
    input_ids = np.full((max(1, len(rows)), width), pad_token_id, np.int64)
    labels = np.full(input_ids.shape, IGNORED, np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = row.input_ids
        labels[i, : len(row.labels)] = row.labels
    return _micro_batch(rows, input_ids, labels)


def packed(rows: Sequence[TokenRow], pad_token_id: int) -> MicroBatch:
    """Rows one after the other, (1, tokens), without padding; positions begin at 0 in each. No rows give the empty
    micro-batch: one sample of two padding tokens, with no trained token.
    """
    lengths = [len(row.input_ids) for row in rows] or [2]
    input_ids = np.concatenate([row.input_ids for row in rows] or [np.full(2, pad_token_id)]).astype(np.int64)
    labels = np.concatenate([row.labels for row in rows] or [np.full(2, IGNORED)]).astype(np.int64)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
    ends = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    # the same facts by the names that transformers' flash attention takes: all four, or it asks the GPU in every layer
    flash = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths))
    layout = {"position_ids": positions, "segment_lengths": tuple(lengths), **flash}
    return _micro_batch(rows, input_ids[None], labels[None], layout)


def _micro_batch(
    rows: Sequence[TokenRow],
    input_ids: np.ndarray,
    labels: np.ndarray,
    layout: dict[str, torch.Tensor | tuple[int, ...] | int] | None = None,
) -> MicroBatch:
    # a row's first label is never trained: in a flat layout the token before it, another sample's, predicts nothing
    following = np.append(labels.reshape(-1)[1:], IGNORED)
    predicting = np.flatnonzero(following != IGNORED)
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "predicting": torch.from_numpy(predicting),
        "targets": torch.from_numpy(following[predicting]),
        **(layout or {}),
    }
    return MicroBatch(inputs, len(predicting), sum(len(row.input_ids) for row in rows))
