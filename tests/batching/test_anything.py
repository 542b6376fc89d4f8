"""Any rows, schedule, micro-batch and ranks: every row once per epoch, equally many micro-batches per rank, the same
windows.
"""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from finetune.batching.batch_size import BatchSchedule
from finetune.batching.layout import split_into_micro_batches
from finetune.batching.learning_rate import Schedule
from finetune.batching.plan import BatchPlan
from finetune.batching.windows import Position, epoch_rows, next_window, planned_windows, row_order

SHARES = st.lists(st.integers(1, 99), max_size=4, unique=True).map(
    lambda found: [n / 100 for n in sorted(found)] + [1.0]
)
SIZES = st.lists(st.integers(1, 40), min_size=5, max_size=5)
SEED = 11


@given(SHARES, SIZES, st.integers(1, 120), st.sampled_from([1, 2, 3]), st.integers(1, 6), st.integers(1, 9))
def test_ranks_slice_the_same_windows_whatever_the_schedule(shares, sizes, rows, epochs, per_device, ranks):
    batch = BatchSchedule(tuple(zip(shares, sizes, strict=False)))
    schedule = Schedule(
        "constant", 1.0, 0, planned_windows(rows, batch, epochs), None, sum(epoch_rows(rows, epochs)), batch
    )
    plan = BatchPlan(max(sizes), per_device, 1, ranks)
    position, taken = Position(), []
    while window := next_window(
        position, rows, schedule.batch_rows(position.step, position.applied_rows), SEED, epochs
    ):
        shares_of_ranks = split_into_micro_batches(window.rows, ranks, per_device)
        assert {len(share) for share in shares_of_ranks} == {plan.steps(len(window.rows))}
        assert plan.steps(len(window.rows)) == math.ceil(len(window.rows) / (per_device * ranks))
        in_turn = [row for parts in zip(*shares_of_ranks, strict=True) for part in parts for row in part]
        assert in_turn == list(window.rows), "ranks and micro-batches only slice the window"
        taken += [(window.epoch, row) for row in in_turn]
        position = position.after(window, applied=True)
    assert taken == [(epoch, row) for epoch in range(epochs) for row in row_order(rows, SEED, epoch).tolist()]


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_the_tokens_of_a_window_are_those_of_its_micro_batches(lengths, per_device, ranks):
    # (tokens, trained tokens) of each row; the window's denominator is a sum over ranks and micro-batches
    rows = [(length, min(length, trained)) for length, trained in lengths]
    counted = [
        sum(rows[i][1] for part in share for i in part)
        for share in split_into_micro_batches(range(len(rows)), ranks, per_device)
    ]
    assert sum(counted) == sum(trained for _, trained in rows)


@given(SHARES, SIZES, st.integers(1, 200), st.integers(1, 30), st.sets(st.integers(0, 40), max_size=10))
def test_a_run_by_steps_ends_after_its_steps_whatever_was_skipped(shares, sizes, rows, steps, skipped):
    batch = BatchSchedule(tuple(zip(shares, sizes, strict=False)))
    schedule = Schedule("linear", 1.0, 0, steps, steps, None, batch)
    position = Position()
    while not schedule.finished(position.step, position.applied_rows):
        wanted = schedule.batch_rows(position.step, position.applied_rows)
        window = next_window(position, rows, wanted, SEED)
        assert 0 < len(window.rows) <= wanted == batch.rows(position.step / steps)
        position = position.after(window, applied=window.index not in skipped)
    assert position.step == steps and position.window == steps + sum(index < position.window for index in skipped)
