"""Rows -> windows -> ranks -> micro-batches: nothing lost, nothing twice, the same rows however many ranks slice
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.batching.batch_size import BatchSchedule
from finetune.batching.layout import split_into_micro_batches
from finetune.batching.windows import Position, Window, epoch_rows, next_window, planned_windows, row_order

ORDER_42_0 = [4, 1, 3, 6, 0, 7, 2, 5]
ORDER_42_1 = [1, 2, 5, 3, 6, 0, 4, 7]


def windows(rows: int, batch_rows: int, seed: int, epochs: float = math.inf) -> Iterator[Window]:
    """Every window of a run whose batch is always the same."""
    position = Position()
    while window := next_window(position, rows, batch_rows, seed, epochs):
        yield window
        position = position.after(window, applied=True)


def always(rows: int) -> BatchSchedule:
    return BatchSchedule(((1.0, rows),))


COUNTS = st.integers(1, 300)
SEEDS = st.integers(0, 2**32)


@given(COUNTS, SEEDS, st.integers(0, 50))
def test_order_is_a_permutation_and_depends_on_seed_and_epoch_alone(rows, seed, epoch):
    order = row_order(rows, seed, epoch).tolist()
    assert sorted(order) == list(range(rows))
    row_order(rows + 1, seed + 1, epoch + 1)  # what was drawn in between leaves no trace
    assert row_order(rows, seed, epoch).tolist() == order


def test_order_differs_between_epochs_and_seeds():
    orders = {tuple(row_order(100, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_stays_the_same_between_versions():
    # resumed runs and comparisons between machines rest on these numbers
    assert row_order(8, 42, 0).tolist() == ORDER_42_0
    assert row_order(8, 42, 1).tolist() == ORDER_42_1


@given(COUNTS, st.integers(1, 64), SEEDS, st.integers(1, 3))
def test_windows_take_every_row_once_per_epoch_in_order(rows, batch_rows, seed, epochs):
    found = list(windows(rows, batch_rows, seed, epochs))
    assert [w.index for w in found] == list(range(len(found)))
    assert len(found) == planned_windows(rows, always(batch_rows), epochs) == epochs * math.ceil(rows / batch_rows)
    for epoch in range(epochs):
        of_epoch = [w for w in found if w.epoch == epoch]
        assert [r for w in of_epoch for r in w.rows] == row_order(rows, seed, epoch).tolist()
        assert [w.first_row for w in of_epoch] == list(range(0, rows, batch_rows))
        assert all(len(w.rows) == batch_rows for w in of_epoch[:-1]), "only an epoch's last window may be short"


def test_endless_windows_go_through_epoch_after_epoch():
    found = list(islice(windows(5, 2, seed=1), 7))
    assert [(w.epoch, w.first_row, len(w.rows)) for w in found] == [
        (0, 0, 2),
        (0, 2, 2),
        (0, 4, 1),
        (1, 0, 2),
        (1, 2, 2),
        (1, 4, 1),
        (2, 0, 2),
    ]


@pytest.mark.parametrize(
    "rows, epochs, wanted",
    [(10, 1, [10]), (10, 3, [10, 10, 10]), (10, 0.5, [5]), (10, 2.25, [10, 10, 2]), (10, 0.01, [1]), (3, 1.5, [3, 2])],
)
def test_a_fractional_epoch_takes_its_share_and_at_least_one_row(rows, epochs, wanted):
    assert epoch_rows(rows, epochs) == wanted
    found = list(windows(rows, 4, 0, epochs))
    assert sum(len(w.rows) for w in found) == sum(wanted)
    assert len(found) == planned_windows(rows, always(4), epochs)


def test_a_fractional_epoch_takes_the_first_rows_of_that_epochs_order():
    taken = [r for w in windows(10, 4, 7, 1.5) if w.epoch == 1 for r in w.rows]
    assert taken == row_order(10, 7, 1)[:5].tolist()


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 9))
def test_deal_gives_every_row_to_one_rank_and_every_rank_equally_many_micro_batches(rows, ranks, per_device):
    window = list(range(1000, 1000 + rows))
    shares = split_into_micro_batches(window, ranks, per_device)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1, "a rank with fewer micro-batches would leave the others waiting"
    assert sorted(r for share in shares for part in share for r in part) == window
    assert max((len(part) for share in shares for part in share), default=0) <= per_device
    assert len(shares[0]) == max(1, math.ceil(rows / (ranks * per_device))), "no micro-batch that nobody needs"


@given(st.integers(1, 64), st.integers(1, 4))
def test_ranks_and_micro_batches_only_slice_a_window(rows, per_device):
    window = tuple(row_order(rows, 3, 0).tolist())

    def groups(ranks: int) -> list[tuple[int, ...]]:
        """Non-empty micro-batches in the order in which the ranks take them side by side."""
        return [
            part
            for parts in zip(*split_into_micro_batches(window, ranks, per_device), strict=True)
            for part in parts
            if part
        ]

    assert groups(1) == groups(2) == groups(4) == groups(8)
    assert tuple(r for part in groups(4) for r in part) == window


def test_one_rank_k8_two_ranks_k4_and_eight_ranks_k1_see_the_same_rows_per_window():
    for window in windows(100, 16, seed=42, epochs=2):
        seen = [
            sorted(r for share in split_into_micro_batches(window.rows, n, 2) for part in share for r in part)
            for n in (1, 2, 8)
        ]
        assert seen[0] == seen[1] == seen[2] == sorted(window.rows)
        if len(window.rows) == 16:
            assert [len(split_into_micro_batches(window.rows, n, 2)[0]) for n in (1, 2, 8)] == [8, 4, 1]


def test_a_skipped_window_uses_up_rows_but_is_no_step_and_no_progress():
    # windows of 4, 4 and 2 rows; the second one applies nothing
    position, seen = Position(), []
    for window in windows(10, 4, seed=1, epochs=1):
        position = position.after(window, applied=window.index != 1)
        seen.append((position.window, position.step, position.applied_rows, position.skipped_in_a_row))
    assert seen == [(1, 1, 4, 0), (2, 1, 4, 1), (3, 2, 6, 0)]
