"""Token rows of random lengths and masks, for launched tests."""

from __future__ import annotations

import numpy as np

from finetune.data.token_cache import TokenRow


def random_rows(random: np.random.Generator, count: int, vocabulary: int) -> list[TokenRow]:
    """Rows of 3 to 48 tokens, a random part of each trained: all of it, a single token, now and then none.

    The first row always trains a token, so that no window is empty.
    """
    rows = []
    for i in range(count):
        length = int(random.integers(3, 49))
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(random.random(length) < random.random(), ids, -100).astype(np.int32)
        labels[0], labels[-1] = -100, ids[-1]
        if i > 0 and random.random() < 0.1:
            labels[:] = -100
        rows.append(TokenRow(ids, labels))
    return rows
