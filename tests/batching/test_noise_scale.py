"""The gradient noise scale: unbiased for micro-batches of any sizes, and a batch that follows it within its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.batching.batch_size import BatchSchedule, batch_schedule
from finetune.batching.learning_rate import LrScaling, Schedule
from finetune.batching.noise_scale import FIRST_CHANGE, HYSTERESIS, NoiseMeasurement, NoiseState, adapt, measure
from finetune.recipe.fields import AccumulationSection

SIZES = np.array([3, 40, 7, 1, 19])  # trained tokens of five ragged micro-batches


def window_of(random: np.random.Generator, mean: np.ndarray, spread: float, sizes: np.ndarray) -> tuple[float, float]:
    """(sum of t |g|^2 over micro-batches, |g| of the window) for one draw of per-token gradients."""
    tokens = mean + spread * random.standard_normal((sizes.sum(), len(mean)))
    parts = [part.mean(0) for part in np.split(tokens, np.cumsum(sizes)[:-1])]
    return sum(t * float(part @ part) for t, part in zip(sizes, parts, strict=True)), float(
        np.linalg.norm(tokens.mean(0))
    )


def test_noise_and_signal_are_unbiased_for_ragged_micro_batches():
    random, mean, spread, draws = np.random.default_rng(3), np.array([0.3, -0.2, 0.1, 0.0]), 1.5, 6000
    seen = [measure(*_order(window_of(random, mean, spread, SIZES))) for _ in range(draws)]
    for found, wanted in (
        ([m.noise for m in seen], len(mean) * spread**2),
        ([m.signal for m in seen], float(mean @ mean)),
    ):
        error = np.mean(found) - wanted
        assert abs(error) < 5 * np.std(found) / draws**0.5, (np.mean(found), wanted)  # five standard errors
    assert min(m.signal for m in seen) < 0, "unbiased: by chance below zero"
    # the plain squared norm of the window's gradient
    biased = np.mean([m.signal + m.noise / SIZES.sum() for m in seen])
    assert biased > 1.5 * float(mean @ mean)


def _order(drawn: tuple[float, float]) -> tuple[float, int, float, int, float]:
    weighted_squares, norm = drawn
    return weighted_squares, len(SIZES), float(SIZES.sum()), 10, norm


def test_two_sizes_are_the_papers_formulas():
    small, squares, big_norm = 8, [2.0, 3.0, 2.5, 4.5], 1.25  # |g_i|^2 of four micro-batches of 8 tokens
    big = 4 * small
    seen = measure(sum(small * s for s in squares), 4, big, 6, big_norm)
    mean_small = sum(squares) / 4
    signal = (big * big_norm**2 - small * mean_small) / (big - small)  # appendix A.1
    noise = (mean_small - big_norm**2) / (1 / small - 1 / big)
    assert (seen.signal, seen.noise) == (pytest.approx(signal, rel=1e-12), pytest.approx(noise, rel=1e-12))
    assert seen.tokens_per_row == pytest.approx(32 / 6)


@pytest.mark.parametrize(("micro_batches", "norm"), [(1, 1.0), (0, 1.0), (4, float("nan")), (4, float("inf"))])
def test_a_window_that_shows_nothing_is_left_out(micro_batches, norm):
    assert measure(10.0, micro_batches, 32, 4, norm) is None


def steady(noise_tokens: float, tokens_per_row: float = 10.0) -> NoiseMeasurement:
    return NoiseMeasurement(noise=noise_tokens, signal=1.0, tokens_per_row=tokens_per_row)


def follow(state: NoiseState, seen: NoiseMeasurement, times: int, least: int = -2, most: int = 2) -> list[int]:
    sizes = []
    for _ in range(times):
        state = adapt(state, seen, 8, least, most)
        sizes.append(state.doublings)
    return sizes


def test_the_batch_doubles_to_the_noise_scale_and_no_further():
    # 80 tokens per batch at first; a noise scale of 160 tokens is one doubling
    assert follow(NoiseState(), steady(160.0), 8) == [0] * (FIRST_CHANGE - 1) + [1] * (9 - FIRST_CHANGE)
    assert follow(NoiseState(), steady(10.0), 8) == [0, 0, -1, -2, -2, -2, -2, -2], "halved to its limit"
    assert follow(NoiseState(), steady(1e9), 8) == [0, 0, 1, 2, 2, 2, 2, 2], "doubled to its limit"


def test_the_batch_rests_while_the_noise_scale_is_near():
    for distance in (-0.74, -0.3, 0.0, 0.5, 0.74):
        assert abs(distance) < HYSTERESIS
        assert set(follow(NoiseState(), steady(80 * 2**distance), 30)) == {0}
        assert set(follow(NoiseState(doublings=1), steady(160 * 2**distance), 30)) == {1}


def test_a_signal_lost_in_the_noise_asks_for_more_rows():
    lost = NoiseMeasurement(noise=50.0, signal=-0.1, tokens_per_row=10.0)
    state = adapt(NoiseState(measured=5, noise=50.0, signal=0.0, tokens_per_row=10.0), lost, 8, -2, 2)
    assert state.doublings == 1 and state.scale_tokens is None
    assert NoiseState().scale_tokens is None


@given(st.lists(st.tuples(st.floats(-5, 1e4), st.floats(-1, 10), st.floats(1, 500)), max_size=40))
def test_any_measurements_keep_the_batch_within_its_limits_one_doubling_at_a_time(found):
    state = NoiseState()
    for noise, signal, tokens_per_row in found:
        after = adapt(state, NoiseMeasurement(noise, signal, tokens_per_row), 8, -1, 3)
        assert -1 <= after.doublings <= 3 and abs(after.doublings - state.doublings) <= 1
        assert after.measured == state.measured + 1
        assert after.scale_tokens is None or after.scale_tokens >= 0
        state = after


def test_sizes_are_the_global_batch_times_powers_of_two_between_the_recipes_limits():
    sizes = batch_schedule(AccumulationSection(schedule="adaptive", smallest=0.2, largest=9), 12, None)
    assert (sizes.least_doublings, sizes.most_doublings, sizes.adapts, sizes.varies) == (-2, 3, True, False)
    assert [sizes.rows(0.5, doublings) for doublings in range(-2, 4)] == [3, 6, 12, 24, 48, 96]
    assert sizes.largest_rows == 96
    assert BatchSchedule(((0.5, 2), (1.0, 8))).largest_rows == 8
    assert BatchSchedule(((1.0, 3),), -2, 1).rows(0.0, -2) == 1, "never no rows"


def test_the_learning_rate_follows_an_adaptive_batch_where_the_recipe_couples_them():
    sizes = batch_schedule(AccumulationSection(schedule="adaptive"), 8, None)
    schedule = Schedule("constant", 1e-3, 0, 10, 10, None, sizes)
    assert schedule.learning_rate(3, 24, doublings=2) == 1e-3
    coupled = Schedule("constant", 1e-3, 0, 10, 10, None, sizes, LrScaling("sqrt", 8))
    assert coupled.learning_rate(3, 24, doublings=2) == pytest.approx(2e-3)
    assert coupled.learning_rate(3, 24, doublings=-2) == pytest.approx(5e-4)
