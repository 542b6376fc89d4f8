"""A window's rows packed: laid out without padding over ranks and micro-batches. Pure, torch-free."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(
    rows: Sequence[int],
    lengths: Sequence[int],
    ranks: int,
    budget_tokens: int,
    fewest: int = 1,
    in_order: bool = False,
) -> list[list[tuple[int, ...]]]:
    """Deal a window's rows into `[rank][micro_batch]` tuples of at most `budget_tokens` tokens.

    `lengths[i]` are the tokens of `rows[i]`, at most the budget. Rows go, longest first, to the rank with the fewest
    tokens, and there into the first micro-batch that has room (first fit decreasing); within a micro-batch they keep
    their order. With `in_order` they go to the ranks in turn, and there into the last micro-batch or a new one: what
    shares a micro-batch then does not depend on how long it is. Every rank gets the same number of micro-batches
    (collectives need it), at least `fewest` over all ranks where there are as many rows; some may be empty. A function
    of the arguments alone.
    """
    if in_order:
        shares, fit = [list(range(rank, len(rows), ranks)) for rank in range(ranks)], _next_fit
    else:
        shares, fit = _balanced(lengths, ranks), _first_fit
    dealt = [fit(share, lengths, budget_tokens) for share in shares]
    while sum(map(len, dealt)) < min(fewest, len(rows)):
        budget_tokens //= 2  # a row that is longer has a micro-batch to itself
        dealt = [fit(share, lengths, budget_tokens) for share in shares]
    steps = max(1, max(map(len, dealt)))
    return [[tuple(rows[i] for i in sorted(part)) for part in parts] + [()] * (steps - len(parts)) for parts in dealt]


def _balanced(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of rows by rank, longest first, each to the rank with the fewest tokens."""
    lightest = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = lightest[0]
        shares[rank].append(i)
        heapq.heapreplace(lightest, (tokens + lengths[i], rank))
    return shares


def _next_fit(share: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    parts: list[list[int]] = []
    room = 0
    for i in share:
        if not parts or lengths[i] > room:
            parts.append([])
            room = budget_tokens
        parts[-1].append(i)
        room -= lengths[i]
    return parts


def _first_fit(share: Sequence[int], lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    parts: list[list[int]] = []
    room: list[int] = []
    for i in share:
        place = next((k for k, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            parts.append([])
            room.append(budget_tokens)
            place = len(parts) - 1
        parts[place].append(i)
        room[place] -= lengths[i]
    return parts
