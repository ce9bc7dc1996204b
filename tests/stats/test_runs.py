"""Gains of interleaved runs: the interval covers what it says, on machines that are not quiet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.stats.runs import FIRST_LOOK, Looks, Ratio

Floats = NDArray[np.float64]
TRIALS = 1000
TRUE_GAIN = 1.05


def test_the_interval_is_of_paired_ratios() -> None:
    first, other = [100.0, 200.0, 50.0], [110.0, 218.0, 55.5]
    found = Ratio.of(first, other)
    assert found.low < found.median < found.high
    assert found.low > 1.05, "repeats that differ twofold do not widen an interval of pairs"
    with pytest.raises(LeanMoeError, match="at least 2"):
        Ratio.of([1.0], [1.0])


def test_the_interval_is_that_of_wilcoxons_test() -> None:
    logs = np.random.default_rng(0).normal(0.03, 0.02, 12)
    found = Ratio.of(np.ones(12).tolist(), np.exp(logs).tolist())
    for end in (found.low, found.high):
        inside = stats.wilcoxon(logs - np.log(end) * (1 - 1e-9 * np.sign(np.log(end) - 0.03)))
        outside = stats.wilcoxon(logs - np.log(end) * (1 + 1e-9 * np.sign(np.log(end) - 0.03)))
        assert inside.pvalue > 0.05 >= outside.pvalue


def test_one_stutter_moves_the_gain_little() -> None:
    first, other = [100.0] * 16, [105.0 + n / 10 for n in range(16)]
    quiet = Ratio.of(first, other)
    other[4] = 20.0
    stuttered = Ratio.of(first, other)
    assert stuttered.median == pytest.approx(quiet.median, rel=0.005)
    assert stuttered.low > 1.0


def test_few_repeats_get_students_interval_about_their_mean() -> None:
    found = Ratio.of([1.0, 1.0, 1.0], [1.1, 1.2, 1.3])
    logs = np.log([1.1, 1.2, 1.3])
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert (found.low, found.high) == pytest.approx((np.exp(low), np.exp(high)))
    assert found.median == pytest.approx(np.exp(logs.mean()))


def quiet(rng: np.random.Generator, runs: int) -> Floats:
    return rng.normal(0, 0.01, runs)


def drifting(rng: np.random.Generator, runs: int) -> Floats:
    return rng.normal(0, 0.01, runs) - np.linspace(0, 0.6, runs) ** 2


def bursty(rng: np.random.Generator, runs: int) -> Floats:
    """A tenth of the runs, some of them neighbours, lose up to half of their speed."""
    hit = rng.random(runs) < 0.07
    hit |= np.roll(hit, 1) & (rng.random(runs) < 0.5)
    return rng.normal(0, 0.01, runs) - hit * rng.exponential(0.3, runs)


@pytest.mark.parametrize("noise", [quiet, drifting, bursty])
@pytest.mark.parametrize("most", [5, FIRST_LOOK, 32])
def test_the_interval_covers_the_true_gain(
    noise: Callable[[np.random.Generator, int], Floats], most: int
) -> None:
    """Runs one after the other, the order within each repeat drawn; looked at as `tune` does."""
    rng = np.random.default_rng(0)
    looks = Looks(most, 0.02, 0.95)
    covered, taken = 0, 0
    for _ in range(TRIALS):
        speeds = np.exp(noise(rng, 2 * most)).reshape(most, 2)
        first = rng.integers(0, 2, most)
        full = speeds[np.arange(most), first]
        plan = TRUE_GAIN * speeds[np.arange(most), 1 - first]
        for repeats in looks.numbers:
            ratio = looks.ratio(full[:repeats].tolist(), plan[:repeats].tolist())
            if looks.are_enough(repeats, [ratio]):
                break
        covered += ratio.low <= TRUE_GAIN <= ratio.high
        taken += repeats
    share = covered / (TRIALS)
    error = (0.05 * 0.95 / (TRIALS)) ** 0.5
    assert share > 0.95 - 3 * error
    assert noise is not quiet or most < 32 or taken < 12 * TRIALS, "quiet runs end early"


def test_looks_double_up_to_the_most() -> None:
    assert Looks(32, 0.02, 0.95).numbers == (8, 16, 32)
    assert Looks(20, 0.02, 0.95).numbers == (8, 16, 20)
    assert Looks(5, 0.02, 0.95).numbers == (5,)
    narrow, wide = Ratio(1.05, 1.04, 1.06, 8), Ratio(1.05, 1.0, 1.1, 8)
    looks = Looks(32, 0.02, 0.95)
    assert looks.are_enough(8, [narrow])
    assert not looks.are_enough(8, [narrow, wide])
    assert not looks.are_enough(9, [narrow]), "between looks nothing is decided"
    assert looks.are_enough(32, [wide])


def test_looks_are_paid_for() -> None:
    rng = np.random.default_rng(0)
    first, other = rng.uniform(1, 2, 8).tolist(), rng.uniform(1, 2, 8).tolist()
    once, thrice = (Looks(most, 0.02, 0.95).ratio(first, other) for most in (8, 32))
    assert thrice.low < once.low < once.high < thrice.high
