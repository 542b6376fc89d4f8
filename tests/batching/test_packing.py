"""A window packed over ranks and micro-batches: every row once, no more tokens than allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.batching.packing import pack
from finetune.batching.plan import BatchPlan, derive_batch
from finetune.errors import UserError

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(50, 200), st.integers(1, 3), st.booleans())
def test_every_row_comes_once_within_the_budget_and_every_rank_has_as_many(lengths, ranks, budget, fewest, in_order):
    rows = [100 + i for i in range(len(lengths))]
    dealt = pack(rows, lengths, ranks, budget, fewest, in_order)
    assert len(dealt) == ranks and len({len(share) for share in dealt}) == 1 and len(dealt[0]) >= 1
    parts = [part for share in dealt for part in share]
    assert sorted(row for part in parts for row in part) == rows
    assert all(sum(lengths[row - 100] for row in part) <= budget for part in parts)
    assert all(list(part) == sorted(part) for part in parts)
    assert sum(map(bool, parts)) >= min(fewest, len(rows))
    assert dealt == pack(rows, lengths, ranks, budget, fewest, in_order)


def test_by_hand():
    # longest first to the lightest rank: rank 0 gets 9, 4, 3 (16), rank 1 gets 8, 5, 2 (15); then first fit into 12
    assert pack("abcdef", [3, 9, 8, 2, 5, 4], 2, 12) == [[("a", "b"), ("f",)], [("c", "d"), ("e",)]]
    # in order: rank 0 gets 3, 8, 5, rank 1 gets 9, 2, 4; then into the last micro-batch or a new one
    assert pack("abcdef", [3, 9, 8, 2, 5, 4], 2, 12, in_order=True) == [[("a", "c"), ("e",)], [("b", "d"), ("f",)]]


@given(st.lists(st.integers(1, 50), min_size=8, max_size=60), st.integers(1, 4))
def test_ranks_differ_by_one_row_at_most(lengths, ranks):
    shares = pack(range(len(lengths)), lengths, ranks, 100)
    tokens = [sum(lengths[row] for part in share for row in part) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(LENGTHS, st.integers(1, 3))
def test_a_full_micro_batch_has_at_least_as_many_rows_as_it_would_have_padded(lengths, per_device):
    # so that K is never larger than with rows of the greatest length
    dealt = pack(range(len(lengths)), lengths, 1, 50 * per_device)
    assert len(dealt[0]) <= max(1, -(-len(lengths) // per_device))


def test_a_plan_deals_both_layouts():
    packed, padded = (BatchPlan(6, 2, 3, 1, row_tokens=tokens) for tokens in (10, None))
    lengths = [3, 9, 8, 2, 5, 4]
    assert packed.budget_tokens == 20 and padded.budget_tokens is None
    assert packed.deal(range(6), lengths) == [[(0, 1, 2), (3, 4, 5)]]
    assert padded.deal(range(6), lengths) == [[(1, 2), (4, 5), (0, 3)]], "rows of like length share a micro-batch"
    assert padded.deal(range(6), lengths, in_order=True) == [[(0, 1), (2, 3), (4, 5)]]


def test_packed_any_micro_batch_goes_with_any_global_batch_and_k_is_never_said():
    plan = derive_batch(10, 4, "auto", 3, row_tokens=64)
    assert (plan.budget_tokens, plan.global_batch_rows, plan.accumulation_steps) == (256, 10, 1)
    assert plan.line() == "10 rows per optimizer step over 3 ranks, packed into micro-batches of at most 256 tokens"
    assert derive_batch(10, "auto", "auto", 3, row_tokens=64).open
    with pytest.raises(UserError, match="gradient_accumulation_steps is 4, but data.packing is true.*Leave it auto"):
        derive_batch(8, 2, 4, 1, row_tokens=64)
