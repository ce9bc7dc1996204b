"""Lengths of replies: what ends, the ratio, and how often its intervals are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import PairedRatio, RatioOfRuns
from leanmoe.stats.reply_lengths import compare_lengths, finished_length, per_finished_request
from leanmoe.stats.runs import Ratio

ENDS = frozenset({0, 9})
TRIALS = 400
PROMPTS = 60


def test_a_reply_is_as_long_as_up_to_its_end_with_it() -> None:
    assert finished_length([5, 6, 0, 7, 9], ENDS) == 3
    assert finished_length([9], ENDS) == 1
    assert finished_length([5, 6], ENDS) is None
    assert finished_length([5, 0], frozenset()) is None


def test_the_ratio_is_of_mean_lengths_where_both_end() -> None:
    full = [10, 30, None, 20, *[20] * 20]
    plan = [20, 30, 5, None, *[24] * 20]
    found = compare_lengths(full, [plan], 128)
    assert (found.prompts, found.full_ended, found.plan_ended, found.both_ended) == (24, 23, 23, 22)
    assert found.ratio is not None
    assert found.ratio.ratio == pytest.approx((20 + 30 + 480) / (10 + 30 + 400))
    assert found.ratio.low < found.ratio.ratio < found.ratio.high


def test_several_draws_count_with_their_mean() -> None:
    full = [10] * 25
    found = compare_lengths(full, [[12] * 25, [14] * 25], 128)
    assert found.ratio is not None
    assert found.ratio.ratio == pytest.approx(1.3)
    assert found.ratio.low < 1.25, "two draws that differ say little of a third"
    one_cut = compare_lengths(full, [[12] * 25, [None, *[14] * 24]], 128)
    assert (one_cut.plan_ended, one_cut.both_ended) == (25, 24)


def test_too_few_that_end_give_no_ratio() -> None:
    full: list[int | None] = [8] * 19 + [None] * 13
    assert compare_lengths(full, [full], 64).ratio is None
    full[19] = 8
    assert compare_lengths(full, [full], 64).ratio == PairedRatio(1.0, 1.0, 1.0)
    assert compare_lengths(full, [full], 64, confidence=0.99).ratio is None


@pytest.mark.parametrize("plan", [[], [[1, 2]]])
def test_lengths_without_a_pair_are_refused(plan: list[list[int | None]]) -> None:
    with pytest.raises(LeanMoeError, match="lengths of 3 replies cannot be paired"):
        compare_lengths([1, 2, 3], plan, 64)


def test_the_ratio_stays_within_what_lengths_can_be() -> None:
    full, plan = [1] * 24 + [60], [60] * 24 + [1]
    found = compare_lengths(full, [plan], 60).ratio
    assert found is not None
    assert found.low >= 1 / 60
    assert found.high <= 60


def test_replies_as_long_leave_the_gain_and_twice_as_long_halve_it() -> None:
    gain = RatioOfRuns(1.2, 1.1, 1.3, 8)
    same = per_finished_request(gain, PairedRatio(1.0, 1.0, 1.0))
    assert (same.ratio, same.low, same.high) == pytest.approx((1.2, 1.1, 1.3))
    halved = per_finished_request(gain, PairedRatio(2.0, 1.6, 2.5))
    assert halved.ratio == pytest.approx(0.6)
    reach = math.hypot(math.log(1.2 / 1.1), math.log(2.5 / 2.0))
    assert math.log(halved.ratio / halved.low) == pytest.approx(reach)


def test_intervals_hold_as_often_as_they_say() -> None:
    """Lengths as replies have them: skewed, and alike for one prompt; runs of a noisy machine."""
    draw = np.random.default_rng(7)
    growth, gain = 1.15, 1.3
    in_lengths = in_finished = grown = 0
    for _ in range(TRIALS):
        base_U = np.exp(draw.normal(4.0, 0.6, PROMPTS))
        full = np.maximum(1, np.rint(base_U * np.exp(draw.normal(0, 0.3, PROMPTS)))).astype(int)
        later = growth * base_U * np.exp(draw.normal(0, 0.3, PROMPTS))
        plan = np.maximum(1, np.rint(later)).astype(int)
        found = compare_lengths(full.tolist(), [plan.tolist()], 10_000).ratio
        assert found is not None
        first = np.exp(draw.normal(0, 0.05, 12))
        runs = Ratio.of(first.tolist(), (gain * np.exp(draw.normal(0, 0.05, 12))).tolist())
        finished = per_finished_request(runs, found)
        in_lengths += found.low <= growth <= found.high
        in_finished += finished.low <= gain / growth <= finished.high
        lost = per_finished_request(RatioOfRuns(growth, growth, growth, 12), found)
        grown += lost.high < 1
    assert 0.925 <= in_lengths / TRIALS <= 0.985
    assert 0.93 <= in_finished / TRIALS <= 1.0
    assert grown / TRIALS <= 0.05, "refused where replies grow by just what is gained: 2.5% of it"
