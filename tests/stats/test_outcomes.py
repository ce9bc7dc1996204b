"""Paired statistics over questions: against plain sums, and by how often they are wrong."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.stats.outcomes import (
    difference,
    forecast,
    least_loss,
    mcnemar,
    mean_of_tasks,
    non_inferior_accuracy,
    smallest_loss,
    tango_bound,
)

TRIALS = 400


def answers(lost: int, gained: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    full = np.array([1] * lost + [0] * gained + [1] * both + [0] * neither, dtype=bool)
    plan = np.array([0] * lost + [1] * gained + [1] * both + [0] * neither, dtype=bool)
    return full, plan[None]


def score_by_search(gained: int, lost: int, items: int, value: float) -> float:
    """The score with the likeliest proportions found by search instead of the closed form."""

    def unlikely(share_lost: float) -> float:
        found = (share_lost + value, share_lost, 1 - 2 * share_lost - value)
        counts = (gained, lost, items - gained - lost)
        return -sum(c * math.log(max(p, 1e-300)) for c, p in zip(counts, found, strict=True))

    low, high = max(0.0, -value), (1 - value) / 2
    share = optimize.minimize_scalar(
        unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    ).x
    variance = items * (2 * share + value * (1 - value))
    return (gained - lost - items * value) / math.sqrt(variance)


@pytest.mark.parametrize(("gained", "lost", "items"), [(12, 2, 50), (3, 9, 200), (1, 1, 40)])
def test_tangos_bounds_are_where_the_score_test_begins_to_reject(
    gained: int, lost: int, items: int
) -> None:
    for miss in (0.025, 0.05):
        wanted = stats.norm.ppf(1 - miss)
        low = tango_bound(gained, lost, items, miss, up=False)
        high = tango_bound(gained, lost, items, miss, up=True)
        assert low < (gained - lost) / items < high
        assert score_by_search(gained, lost, items, low) == pytest.approx(wanted, abs=2e-3)
        assert score_by_search(gained, lost, items, high) == pytest.approx(-wanted, abs=2e-3)


def test_intervals_hold_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    inside = above = 0
    for _ in range(TRIALS):
        full = draw.random(300) < 0.6
        lost, gained = draw.random(300) < 0.08, draw.random(300) < 0.05
        plan = np.where(full, ~lost, gained)
        truth = 0.4 * 0.05 - 0.6 * 0.08
        found = difference(full, plan[None])
        inside += found.low <= truth <= found.high
        above += found.lower_bound <= truth
    assert 0.92 <= inside / TRIALS <= 0.98
    assert 0.92 <= above / TRIALS <= 0.98


def test_nothing_changed_is_not_proven_to_be_nothing() -> None:
    at = partial(difference, *answers(0, 0, 60, 40))
    found = at(0.95)
    assert (found.difference, found.mcnemar) == (0.0, 1.0)
    assert -0.04 < found.low < 0 < found.high < 0.04
    assert non_inferior_accuracy(at, 0.04).accepted
    assert not non_inferior_accuracy(at, 0.01).accepted


def test_a_verdict_that_shares_the_error_needs_more_and_says_so() -> None:
    at = partial(difference, *answers(0, 0, 60, 40))
    margin = -at(0.95).lower_bound + 1e-6
    assert non_inferior_accuracy(at, margin).accepted
    shared = non_inferior_accuracy(at, margin, sharing=6)
    assert not shared.accepted
    assert f"{100 * at(1 - 0.05 / 6).lower_bound:+.2f} where 6 verdicts share" in shared.reason
    assert f"at least {100 * at(0.95).lower_bound:+.2f} with 95%" in shared.reason


def test_counts_and_accuracies() -> None:
    found = difference(*answers(7, 3, 50, 40))
    assert (found.lost, found.gained, found.items) == (7, 3, 100)
    assert (found.full, found.plan) == (0.57, 0.53)
    assert found.mcnemar == pytest.approx(2 * stats.binom.cdf(3, 10, 0.5))
    assert mcnemar(5, 5) == 1.0


def test_batch_draws_widen_the_interval_and_are_shown() -> None:
    full, plan = answers(10, 4, 150, 136)
    other = np.roll(plan, 1, axis=1)
    one, both = difference(full, plan), difference(full, np.concatenate([plan, other]))
    assert both.batch_draws == 2
    assert both.lowest_draw <= both.difference <= both.highest_draw
    assert (one.lowest_draw, one.highest_draw) == (one.difference, one.difference)


def test_tasks_count_the_same_in_their_mean() -> None:
    large, small = difference(*answers(100, 0, 500, 400)), difference(*answers(0, 20, 40, 40))
    found = mean_of_tasks([large, small])
    assert found.difference == pytest.approx((-0.1 + 0.2) / 2)
    assert found.low < found.difference < found.high
    assert found.high - found.difference < small.high - small.difference


@settings(deadline=None, max_examples=60)
@given(
    lost=st.integers(0, 30), gained=st.integers(0, 30), both=st.integers(0, 60),
    neither=st.integers(0, 60),
)  # fmt: skip
def test_bounds_are_ordered(lost: int, gained: int, both: int, neither: int) -> None:
    if lost + gained + both + neither == 0:
        return
    found = difference(*answers(lost, gained, both, neither))
    assert -1 <= found.low <= found.lower_bound <= found.difference <= found.high <= 1
    mirrored = difference(*answers(gained, lost, both, neither))
    assert mirrored.low == pytest.approx(-found.high, abs=1e-6)
    assert mirrored.mcnemar == pytest.approx(found.mcnemar)


def test_what_can_be_seen_is_seen_that_often() -> None:
    """The loss that is named as the smallest is found in about 80 of 100 runs."""
    items, changes = 800, 0.06
    loss = smallest_loss(items, changes)
    draw = np.random.default_rng(1)
    seen = 0
    for _ in range(TRIALS):
        sides = draw.random(items)
        lost = int((sides < (changes + loss) / 2).sum())
        gained = int(((sides > 0.5) & (sides < 0.5 + (changes - loss) / 2)).sum())
        seen += tango_bound(gained, lost, items, 0.05, up=True) < 0
    assert 0.72 <= seen / TRIALS <= 0.88


def test_1319_questions_cannot_show_half_a_point() -> None:
    assert 0.005 < least_loss(1319) < 0.0055
    assert "They can't show 0.5 points" in forecast("gsm8k", 1319, 0.005)
    assert "can't" not in forecast("all", 42_000, 0.005)
    assert least_loss(4) == 1.0


def test_unpaired_answers_are_refused() -> None:
    with pytest.raises(LeanMoeError, match="cannot be paired"):
        difference(np.ones(3, dtype=bool), np.ones((1, 4), dtype=bool))
    with pytest.raises(LeanMoeError, match="cannot be paired"):
        difference(np.ones(0, dtype=bool), np.ones((1, 0), dtype=bool))
