"""The spike rule: three losses in a row far above those before, and nothing less."""

from __future__ import annotations

import math
import random

from finetune.training.loss_spike import IN_A_ROW, MIN_HISTORY, REMEMBERED, consecutive_outliers, limit, remember


def noisy(count: int, seed: int = 0, middle: float = 2.0, sigma: float = 0.3) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(middle, sigma) for _ in range(count)]


def test_the_limit_is_ten_standard_deviations_or_one_nat_above_the_median():
    assert limit([2.0] * MIN_HISTORY) == 3.0
    losses = noisy(100_001, sigma=0.3)
    assert math.isclose(limit(losses), 2.0 + 10 * 0.3, abs_tol=0.05)  # the estimate's own error at this many losses
    losses[:40_000] = [1e9] * 40_000
    assert limit(losses) < 2.0 + 40 * 0.3, "four of ten losses gone wild move the limit and do not break it"


def test_three_in_a_row_and_not_two():
    usual = noisy(MIN_HISTORY)
    assert [consecutive_outliers([*usual, *[9.0] * count]) for count in range(5)] == [0, 1, 2, 3, 3]
    assert consecutive_outliers([*usual, 9.0, 9.0, 2.0]) == 0
    assert consecutive_outliers([*usual, 9.0, 2.0, 9.0, 9.0]) == 2


def test_too_few_losses_say_nothing():
    assert consecutive_outliers([]) == 0
    assert consecutive_outliers([*noisy(MIN_HISTORY - 2), 99.0, 99.0]) == 0


def test_ordinary_noise_never_trips_it():
    for seed in range(20):
        losses: tuple[float, ...] = ()
        for loss in noisy(2_000, seed, sigma=1.0):
            losses = remember(losses, loss)
            assert consecutive_outliers(losses) < IN_A_ROW
    assert len(losses) == REMEMBERED + IN_A_ROW


def test_a_falling_loss_and_a_level_that_comes_back_are_no_spikes():
    falling = [10.0 * 0.97**step for step in range(300)]
    assert all(consecutive_outliers(falling[:end]) == 0 for end in range(300))
    assert consecutive_outliers([*[0.001] * 64, 0.9, 0.9, 0.9]) == 0, (
        "a memorised set, then rows that are not: less than a nat"
    )
