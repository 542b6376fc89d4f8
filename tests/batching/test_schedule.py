"""The learning rate as a pure function of progress, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.batching.batch_size import BatchSchedule, batch_schedule
from finetune.batching.learning_rate import LrScaling, Schedule, decay, rate_text, warmup_steps_of
from finetune.batching.windows import Position, epoch_rows, next_window, planned_windows, row_order
from finetune.recipe.fields import AccumulationSection

ALWAYS = BatchSchedule(((1.0, 4),))
WARMUP = BatchSchedule(((0.25, 2), (0.5, 4), (1.0, 8)))
SHAPES = ("constant", "linear", "cosine", "cosine_with_min_lr")


def by_steps(shape: str, steps: int, warmup: int = 0, peak: float = 1.0) -> list[float]:
    schedule = Schedule(shape, peak, warmup, steps, max_steps=steps, total_rows=None, batch=ALWAYS)
    return [schedule.learning_rate(step, applied_rows=10**6) for step in range(steps)]


def test_linear_decay_by_steps():
    assert by_steps("linear", 4) == [1.0, 0.75, 0.5, 0.25]


def test_warmup_is_step_plus_one_over_warmup_steps_then_decay_starts_at_the_peak():
    # 2 of 10 steps warm up: 1/2, 2/2, then the remaining 8 steps fall from 1 in eighths
    assert by_steps("linear", 10, warmup=2) == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_cosine_by_steps():
    assert by_steps("cosine", 4, peak=2e-4) == pytest.approx(
        [2e-4, 2e-4 * 0.8535533905932737, 1e-4, 2e-4 * 0.14644660940672624]
    )


def test_cosine_with_min_lr_ends_at_a_tenth():
    assert decay("cosine_with_min_lr", 0.0) == 1.0
    assert decay("cosine_with_min_lr", 0.5) == pytest.approx(0.55)
    assert decay("cosine_with_min_lr", 1.0) == pytest.approx(0.1)


def test_constant_with_warmup():
    assert by_steps("constant", 5, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_an_unknown_shape_is_our_own_mistake():
    with pytest.raises(ValueError, match="polynomial"):
        decay("polynomial", 0.5)


def test_by_epochs_progress_is_applied_rows_over_all_rows():
    # 10 rows, windows of 4, two epochs: windows of 4, 4, 2, 4, 4, 2 rows
    schedule = Schedule("linear", 1.0, 0, planned_steps=6, max_steps=None, total_rows=20, batch=ALWAYS)
    applied = [0, 4, 8, 10, 14, 18]
    assert [schedule.learning_rate(i, rows) for i, rows in enumerate(applied)] == pytest.approx(
        [1, 0.8, 0.6, 0.5, 0.3, 0.1]
    )
    assert [schedule.finished(6, rows) for rows in (18, 20)] == [False, True]


def test_by_steps_a_skipped_window_moves_nothing():
    schedule = Schedule("linear", 1.0, 0, planned_steps=4, max_steps=4, total_rows=None, batch=ALWAYS)
    assert schedule.learning_rate(2, applied_rows=0) == schedule.learning_rate(2, applied_rows=99) == 0.5
    assert [schedule.finished(step, 0) for step in (3, 4)] == [False, True]


def test_warmup_ratio_is_rounded_up_and_warmup_steps_win():
    assert warmup_steps_of(0.03, None, 100) == 3
    assert warmup_steps_of(0.03, None, 101) == 4
    assert warmup_steps_of(0.03, None, 1) == 1
    assert warmup_steps_of(None, None, 100) == warmup_steps_of(0.0, None, 100) == 0
    assert warmup_steps_of(0.5, 7, 100) == 7


@given(st.sampled_from(SHAPES), st.integers(1, 200), st.integers(0, 250))
def test_learning_rate_stays_in_bounds_rises_then_falls(shape, steps, warmup):
    rates = by_steps(shape, steps, warmup)
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert math.isclose(max(rates), 1.0) or warmup > steps


def test_lr_scaling_by_hand():
    assert LrScaling().factor(64) == 1.0
    assert LrScaling("sqrt", 16).factor(64) == 2.0
    assert LrScaling("linear", 16).factor(64) == 4.0
    assert LrScaling("sqrt", 64).factor(16) == 0.5
    assert LrScaling("linear", 64).factor(64) == 1.0
    assert LrScaling("sqrt", 32).factor(64) == pytest.approx(1.4142135623730951, rel=1e-15)


def test_lr_scaling_is_printed_with_its_arithmetic():
    assert LrScaling("sqrt", 16).line(2e-4, 64) == "learning rate 2e-4 x sqrt(64/16) = 4e-4"
    assert LrScaling("linear", 16).line(2e-4, 64) == "learning rate 2e-4 x 64/16 = 8e-4"
    assert LrScaling().line(2e-4, 64) == "learning rate 2e-4"
    assert [rate_text(rate) for rate in (0.0, 1.0, 0.01, 1.5e-5, 2.8284271e-4)] == [
        "0",
        "1",
        "0.01",
        "1.5e-5",
        "2.828e-4",
    ]


@pytest.mark.parametrize("ends", [dict(max_steps=5, total_rows=None), dict(max_steps=None, total_rows=20)])
def test_a_skipped_window_does_not_move_the_learning_rate(ends):
    schedule = Schedule("cosine", 1e-3, 2, planned_steps=5, batch=ALWAYS, **ends)
    position, rates = Position(), []
    for _ in range(4):
        rates.append(schedule.learning_rate(position.step, position.applied_rows))
        window = next_window(position, 20, schedule.batch_rows(position.step, position.applied_rows), seed=1)
        position = position.after(window, applied=window.index != 1)
    # steps 0, 1 (skipped), 1 again, 2: 1/2 and 2/2 of the warm-up, then the cosine at progress 2/5, where the warm-up
    # ends
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])
    assert rates[1] == rates[2]


def test_stages_are_shares_of_the_global_batch_in_whole_rows():
    warmup = AccumulationSection(schedule="warmup")
    assert batch_schedule(warmup, 64, None).stages == ((0.25, 6), (0.5, 13), (1.0, 64))
    assert batch_schedule(warmup, 4, 1).stages == ((0.25, 1), (0.5, 1), (1.0, 4)), "never no rows"
    assert batch_schedule(AccumulationSection(), 64, None).stages == ((1.0, 64),)
    assert [WARMUP.rows(progress) for progress in (0.0, 0.249, 0.25, 0.5, 0.999, 1.0)] == [2, 2, 4, 8, 8, 8]
    assert WARMUP.varies and not ALWAYS.varies and not BatchSchedule(((0.5, 4), (1.0, 4))).varies


def test_a_list_of_k_per_epoch_gives_each_epoch_its_share_of_the_global_batch():
    listed = AccumulationSection(schedule="warmup", warmup=[2, 4, 6, 8])  # min(2 * epoch, 8)
    sizes = batch_schedule(listed, 64, 5)
    assert sizes.stages == ((0.2, 16), (0.4, 32), (0.6, 48), (1.0, 64))
    rows = 100
    schedule = Schedule("constant", 1.0, 0, planned_windows(rows, sizes, 5), None, 5 * rows, sizes)
    found = [size for size, _, _ in walk(schedule, rows, 5)]
    # an epoch's size begins with its first row and ends with its last
    assert found == [16] * 6 + [4] + [32] * 3 + [4] + [48] * 2 + [4] + [64, 36] * 2
    assert batch_schedule(listed, 64, 2).stages == ((0.5, 16), (1.0, 32)), "what is left over is left out"
    assert batch_schedule(listed, 64, 1.5).stages == ((1 / 1.5, 16), (1.0, 32))
    assert batch_schedule(AccumulationSection(schedule="warmup", warmup=[1, 100]), 8, 2).stages[0] == (
        0.5,
        1,
    ), "never none"


def test_by_steps_the_batch_follows_the_share_of_steps():
    schedule = Schedule("constant", 1.0, 0, planned_steps=8, max_steps=8, total_rows=None, batch=WARMUP)
    assert [schedule.batch_rows(step, applied_rows=7) for step in range(8)] == [2, 2, 4, 4, 8, 8, 8, 8]


def walk(
    schedule: Schedule, rows: int, epochs: float, skip: frozenset[int] = frozenset()
) -> list[tuple[int, int, float]]:
    """(rows, step, learning rate) of every window of a run."""
    position, found = Position(), []
    while not schedule.finished(position.step, position.applied_rows):
        window = next_window(position, rows, schedule.batch_rows(position.step, position.applied_rows), 1, epochs)
        if window is None:
            break
        rate = schedule.learning_rate(position.step, position.applied_rows)
        found.append((len(window.rows), position.step, rate))
        position = position.after(window, applied=window.index not in skip)
    return found


def test_batch_and_learning_rate_over_a_run_by_hand():
    # 20 rows: progress before each window 0, .1, .2, .3, .5, .9; the last one is scheduled for 8 rows, and 2 are left
    schedule = Schedule("linear", 1e-3, 9, 6, None, total_rows=20, batch=WARMUP, warmup_share=0.2)
    assert [size for size, _, _ in walk(schedule, 20, 1)] == [2, 2, 2, 4, 8, 2]
    # warm-up: what is done behind the step / 0.2; then 1 - (progress - 0.2) / 0.8
    unscaled = [0.5e-3, 1e-3, 1e-3, 0.875e-3, 0.625e-3, 0.125e-3]
    assert [rate for _, _, rate in walk(schedule, 20, 1)] == pytest.approx(unscaled)
    # sqrt(2/8) three times, sqrt(4/8), then the scheduled 8 rows also for the short window
    scaled = replace(schedule, scaling=LrScaling("sqrt", 8))
    factors = [0.5, 0.5, 0.5, math.sqrt(0.5), 1.0, 1.0]
    assert [rate for _, _, rate in walk(scaled, 20, 1)] == pytest.approx(
        [a * b for a, b in zip(unscaled, factors, strict=True)]
    )


def test_an_epochs_end_cuts_a_window_and_not_the_schedule():
    # 3 epochs of 7 rows; progress 0, 2/21, 4/21, 6/21 (4 rows, 1 left), 7/21, 11/21 (8 rows, 3 left), 14/21 (8 rows, 7
    # left)
    schedule = Schedule("constant", 1.0, 0, 7, None, total_rows=21, batch=WARMUP)
    assert [size for size, _, _ in walk(schedule, 7, 3)] == [2, 2, 2, 1, 4, 3, 7]
    assert planned_windows(7, WARMUP, 3) == 7


def test_a_skipped_window_does_not_move_the_batch_either():
    schedule = Schedule("constant", 1.0, 0, 6, None, total_rows=20, batch=WARMUP)
    # the third window is lost: progress stays at .2, so its successor takes 2 rows again; rows 18 and 19 end the run
    assert [(size, step) for size, step, _ in walk(schedule, 20, 1, skip=frozenset({2}))] == [
        (2, 0),
        (2, 1),
        (2, 2),
        (2, 2),
        (4, 3),
        (8, 4),
    ]


SHARES = st.lists(st.integers(1, 99), max_size=4, unique=True).map(
    lambda found: [n / 100 for n in sorted(found)] + [1.0]
)


@given(
    SHARES, st.lists(st.integers(1, 40), min_size=5, max_size=5), st.integers(1, 120), st.sampled_from([0.3, 1, 2, 2.5])
)
def test_any_schedule_takes_every_row_once_in_as_many_windows_as_planned(shares, sizes, rows, epochs):
    batch = BatchSchedule(tuple(zip(shares, sizes, strict=False)))
    total = sum(epoch_rows(rows, epochs))
    planned = planned_windows(rows, batch, epochs)
    schedule = Schedule("constant", 1.0, 0, planned, None, total, batch)
    position, taken = Position(), []
    while window := next_window(position, rows, schedule.batch_rows(position.step, position.applied_rows), 3, epochs):
        assert 0 < len(window.rows) <= batch.rows(position.applied_rows / total)
        taken += [(window.epoch, row) for row in window.rows]
        position = position.after(window, applied=True)
    order = [
        (epoch, row)
        for epoch, count in enumerate(epoch_rows(rows, epochs))
        for row in row_order(rows, 3, epoch)[:count]
    ]
    assert taken == order
    assert position.window == position.step == planned and schedule.finished(position.step, position.applied_rows)
