"""The gradient noise scale and the batch that follows it. Pure, torch-free.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A: with G the true gradient and tr(S) the
variance of one sample's gradient, summed over the parameters, the noise scale tr(S) / |G|^2 is the batch at which noise
and signal are equal: far below it steps are cheap and noisy, far above it samples are wasted. The sample here is a
trained token.

Both numbers come from one window. Micro-batch i has t_i tokens and the mean gradient g_i, the window T tokens and the
gradient g: E|g_i|^2 = |G|^2 + tr(S) / t_i and E|g|^2 = |G|^2 + tr(S) / T. So (sum of t_i |g_i|^2 - T |g|^2) / (n - 1)
estimates tr(S) and |g|^2 - tr(S) / T estimates |G|^2, both without bias for n micro-batches of any sizes; the paper has
the case of two sizes. Tokens of one row are not independent, as the formulas take them to be: the scale is a measure of
rows, in the unit of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHING = 10  # measurements: the mean of the first ones, then each new one counts a tenth
FIRST_CHANGE = 3  # measurements before the batch may change
HYSTERESIS = 0.75  # doublings between batch and noise scale before the batch changes by one; 0.5 would be the middle


@dataclass(frozen=True)
class NoiseMeasurement:
    """The estimate from one window: squared gradient norms per trained token.

    Both are unbiased, so either may be negative by chance.
    """

    noise: float  # tr(S)
    signal: float  # |G|^2
    tokens_per_row: float


@dataclass(frozen=True)
class NoiseState:
    """Smoothed measurements, and the batch they led to: the global batch times 2 ** doublings."""

    doublings: int = 0
    measured: int = 0
    noise: float = 0.0
    signal: float = 0.0
    tokens_per_row: float = 0.0

    @property
    def scale_tokens(self) -> float | None:
        """The noise scale in trained tokens; None while nothing was measured or the signal is lost in the noise."""
        return max(self.noise, 0.0) / self.signal if self.measured and self.signal > 0 else None

    def smoothed(self, seen: NoiseMeasurement) -> NoiseState:
        """The state with one more measurement in it.

        Noise and signal are averaged apart: their ratio would be biased.
        """
        share = 1 / min(self.measured + 1, SMOOTHING)
        return NoiseState(
            self.doublings,
            self.measured + 1,
            noise=self.noise + share * (seen.noise - self.noise),
            signal=self.signal + share * (seen.signal - self.signal),
            tokens_per_row=self.tokens_per_row + share * (seen.tokens_per_row - self.tokens_per_row),
        )


def measure(
    weighted_squares: float, micro_batches: int, tokens: float, rows: int, grad_norm: float
) -> NoiseMeasurement | None:
    """One window's estimate, or None.

    None where the window has fewer than two micro-batches with tokens, or a gradient that is not finite.
    `weighted_squares` is the sum of t_i |g_i|^2 over the `micro_batches` that have tokens, of all ranks, with g_i the
    gradient of the micro-batch's mean loss; `grad_norm` is |g| before clipping, g the gradient of the window's mean
    loss.
    """
    if micro_batches < 2 or not math.isfinite(weighted_squares + grad_norm):
        return None
    noise = (weighted_squares - tokens * grad_norm**2) / (micro_batches - 1)
    return NoiseMeasurement(noise, grad_norm**2 - noise / tokens, tokens / rows)


def adapt(state: NoiseState, seen: NoiseMeasurement, global_batch_rows: int, least: int, most: int) -> NoiseState:
    """The state after a measurement; its batch is one doubling nearer to the noise scale where they are far apart.

    `least` and `most` are the doublings of the global batch between which the batch stays.
    """
    after = state.smoothed(seen)
    if after.measured < FIRST_CHANGE:
        return after
    batch_tokens = global_batch_rows * 2.0**state.doublings * after.tokens_per_row
    wanted = after.noise / batch_tokens  # against `signal` and not divided by it: that one may be zero or less
    change = (wanted > after.signal * 2**HYSTERESIS) - (wanted < after.signal * 2**-HYSTERESIS)
    doublings = min(max(state.doublings + change, least), most)
    return NoiseState(doublings, after.measured, after.noise, after.signal, after.tokens_per_row)
