"""Paired statistics: against textbook numbers, and by how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.stats import paired
from leanmoe.stats.paired import Divergence, Losses, Ratio, fixed_sequence

Floats = NDArray[np.float64]
TRIALS = 600
TRUE_LOSS = 0.005


def losses(loss_U: Floats, tokens: int = 100) -> Losses:
    names = tuple(f"d{n}" for n in range(len(loss_U)))
    return Losses(names, loss_U, np.full(len(loss_U), tokens))


def some_losses(count: int, increase: float, seed: int = 0) -> tuple[Losses, Losses]:
    draw = np.random.default_rng(seed)
    full = draw.uniform(200, 400, count)
    return losses(full), losses(full * (1 + draw.normal(increase, 0.004, count)))


def test_equally_long_documents_give_the_t_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_bootstrap_t", lambda *_: np.zeros(1))
    change = np.random.default_rng(0).normal(0.01, 0.02, 40)
    found = paired.ratio_of_sums(change, np.ones(40))
    mean, error = change.mean(), change.std(ddof=1) / math.sqrt(40)
    widened = math.sqrt(40 / 39)  # HC3 is a little wider than the plain variance
    assert found.ratio == pytest.approx(mean)
    assert found.upper_bound == pytest.approx(mean + stats.t.ppf(0.95, 39) * error * widened)
    low, high = stats.t.interval(0.95, 39, mean, error * widened)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_bootstrap_t_agrees_with_t_where_both_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    change = np.random.default_rng(1).normal(0.01, 0.02, 300)
    both = paired.ratio_of_sums(change, np.ones(300))
    monkeypatch.setattr(paired, "_bootstrap_t", lambda *_: np.zeros(1))
    t_alone = paired.ratio_of_sums(change, np.ones(300))
    reach = t_alone.upper_bound - t_alone.ratio
    assert reach <= both.upper_bound - both.ratio < 1.1 * reach


def test_one_document_harmed_widens_the_bound_beyond_t(monkeypatch: pytest.MonkeyPatch) -> None:
    change = np.append(np.random.default_rng(2).normal(0.0, 0.001, 39), 0.2)
    both = paired.ratio_of_sums(change, np.ones(40))
    monkeypatch.setattr(paired, "_bootstrap_t", lambda *_: np.zeros(1))
    t_alone = paired.ratio_of_sums(change, np.ones(40))
    assert both.upper_bound - both.ratio > 1.5 * (t_alone.upper_bound - t_alone.ratio)
    assert both.low == pytest.approx(t_alone.low, abs=0.002)


def test_documents_weigh_by_their_tokens() -> None:
    full, tokens = np.array([*[100.0] * 20, *[1000.0] * 20]), np.array([30] * 20 + [300] * 20)
    names = tuple(map(str, range(40)))
    plan = full * np.array([1.1] * 20 + [1.0] * 20)
    found = paired.loss_increase(Losses(names, full, tokens), Losses(names, plan, tokens))
    assert found.ratio == pytest.approx(0.1 * 2000 / 22000)


def test_no_change_is_no_loss_with_certainty() -> None:
    full, _ = some_losses(30, 0.0)
    found = paired.loss_increase(full, full)
    assert (found.ratio, found.low, found.high, found.upper_bound) == (0.0, 0.0, 0.0, 0.0)
    assert paired.non_inferior(full, full, 0.001).accepted


@settings(deadline=None, max_examples=30)
@given(
    change=st.lists(st.floats(-5, 5), min_size=20, max_size=40),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 3),
)
def test_bounds_are_ordered_and_know_no_unit(change: list[float], scale: float, seed: int) -> None:
    change_U = np.array(change)
    base_U = np.random.default_rng(0).uniform(1, 9, len(change))
    found = paired.ratio_of_sums(change_U, base_U, seed=seed)
    assert found.low <= found.ratio <= found.upper_bound <= found.high
    scaled = paired.ratio_of_sums(change_U * scale, base_U * scale, seed=seed)
    assert scaled.upper_bound == pytest.approx(found.upper_bound, rel=1e-6, abs=1e-9)
    bolder = paired.ratio_of_sums(change_U, base_U, 0.9, seed)
    assert bolder.upper_bound <= found.upper_bound


def heavy_tailed(draw: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """(change, loss) of documents: lengths over three orders of magnitude, 0.3 nats of token noise,
    and documents that differ in how much they are harmed. The true increase is TRUE_LOSS."""
    tokens = np.maximum(np.exp(1.5 * draw.standard_normal(count)) * 300, 16)
    nats = np.maximum(draw.normal(3.5, 0.5, count), 1)
    harm = TRUE_LOSS * nats * (1 + 0.6 * draw.standard_normal(count))
    change = harm + draw.normal(0, 0.3, count) / np.sqrt(tokens)
    return change * tokens, nats * tokens


@pytest.mark.parametrize("documents", [20, 50, 200])
def test_a_plan_at_the_margin_is_accepted_one_time_in_twenty(
    documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired, "REPLICATES", 500)
    draw = np.random.default_rng(documents)
    accepted = covered = 0
    for _ in range(TRIALS):
        found = paired.ratio_of_sums(*heavy_tailed(draw, documents))
        accepted += found.upper_bound <= TRUE_LOSS
        covered += found.low <= TRUE_LOSS <= found.high
    # 5% of 600 trials is 30; two standard errors are 11.
    assert 0.02 * TRIALS <= accepted <= 0.05 * TRIALS + 11
    assert covered >= 0.95 * TRIALS - 11


def test_the_documents_said_to_be_needed_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "REPLICATES", 500)
    draw = np.random.default_rng(5)

    def trial(count: int) -> paired.Estimate:
        return paired.ratio_of_sums(draw.normal(0.0, 0.02, count), np.ones(count))

    needed = paired.documents_needed(0.02, margin=0.005)
    assert needed == pytest.approx(((1.645 + 0.842) * 0.02 / 0.005) ** 2, abs=3)
    assert paired.smallest_detectable(0.02, needed) <= 0.005
    assert paired.smallest_detectable(0.02, needed - 1) > 0.005
    accepted = sum(trial(needed).upper_bound <= 0.005 for _ in range(200))
    assert 0.70 * 200 <= accepted <= 0.90 * 200
    assert trial(400).spread == pytest.approx(0.02, rel=0.1)


def test_a_margin_no_document_can_show_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="no number of documents suffices"):
        paired.documents_needed(0.02, margin=0.005, loss=0.005)


def test_verdicts_follow_the_bound_and_say_why() -> None:
    full, plan = some_losses(60, 0.002)
    within = paired.non_inferior(full, plan, 0.005)
    assert within.accepted
    assert "within the margin of 0.50%" in within.reason
    short = paired.non_inferior(full, plan, within.loss.ratio + 1e-4)
    assert not short.accepted
    assert "documents like these would show" in short.reason
    beyond = paired.non_inferior(full, plan, within.loss.ratio - 1e-4)
    assert not beyond.accepted
    assert "documents" not in beyond.reason


def test_too_few_documents_say_how_many_are_needed() -> None:
    full, plan = some_losses(19, 0.0)
    with pytest.raises(LeanMoeError, match="19 found, 20 needed"):
        paired.loss_increase(full, plan)
    full, plan = some_losses(20, 0.0)
    paired.loss_increase(full, plan)
    with pytest.raises(LeanMoeError, match="20 found, 100 needed"):
        paired.loss_increase(full, plan, confidence=0.99)


def test_documents_without_a_prediction_are_left_out() -> None:
    full, plan = some_losses(25, 0.01)
    more_full, more_plan = (
        Losses((*x.names, "empty"), np.append(x.loss_U, 0.0), np.append(x.tokens_U, 0))
        for x in (full, plan)
    )
    assert paired.loss_increase(more_full, more_plan) == paired.loss_increase(full, plan)


def test_a_document_that_is_not_a_number_is_not_left_out() -> None:
    full, plan = some_losses(25, 0.01)
    plan.loss_U[3] = np.nan
    with pytest.raises(LeanMoeError, match="NaN"):
        paired.loss_increase(full, plan)


def test_two_plans_are_compared_document_by_document() -> None:
    full, one = some_losses(50, 0.01, seed=1)
    other = losses(one.loss_U + 0.001 * full.loss_U)
    found = paired.loss_difference(full, other, one)
    assert found.ratio == pytest.approx(0.001)
    assert found.high - found.low < 1e-9 < paired.loss_increase(full, one).high


def test_losses_of_other_texts_are_not_compared() -> None:
    full, plan = some_losses(30, 0.0)
    fewer = Losses(plan.names[:29], plan.loss_U[:29], plan.tokens_U[:29])
    with pytest.raises(LeanMoeError, match="30 documents in one, 29 in the other"):
        paired.loss_increase(full, fewer)
    other = Losses(plan.names, plan.loss_U, plan.tokens_U + np.eye(30, dtype=np.int64)[4])
    with pytest.raises(LeanMoeError, match="document 'd4' has 100 predicted tokens in one and 101"):
        paired.loss_increase(full, other)


def test_sums_add_up_and_survive_json() -> None:
    full, plan = some_losses(3, 0.01)
    assert Losses.from_json(plan.to_json()).loss_U.tolist() == plan.loss_U.tolist()
    once = Divergence(np.array([1.0, 2.0, 3.0]), plan, full)
    assert (once + once).mean_kl == pytest.approx(6.0 / 300)
    assert once.loss_difference == pytest.approx(plan.mean - full.mean)


def test_stops_at_the_first_failure_and_tests_nothing_behind_it() -> None:
    tested: list[int] = []

    def accepts(candidate: int) -> bool:
        tested.append(candidate)
        return candidate != 3

    assert fixed_sequence([1, 2, 3, 4], accepts) == (1, 2)
    assert tested == [1, 2, 3]
    assert fixed_sequence([], accepts) == ()


def test_errs_as_often_as_one_test_while_picking_the_best_does_not() -> None:
    draw = np.random.default_rng(0)
    bad = range(10)
    in_order = best_of = 0
    for _ in range(2000):
        passes = draw.random(len(bad)) < 0.05  # ten bad plans, each tested at 95%
        in_order += bool(fixed_sequence(bad, passes.tolist().__getitem__))
        best_of += bool(passes.any())
    assert in_order < 0.065 * 2000
    assert best_of > 0.35 * 2000


def test_the_interval_is_of_paired_ratios() -> None:
    first, other = [100.0, 200.0, 50.0], [110.0, 218.0, 55.5]
    found = Ratio.of(first, other)
    assert found.low < found.median < found.high
    assert found.low > 1.05, "repeats that differ twofold do not widen an interval of pairs"
    with pytest.raises(LeanMoeError, match="at least 2"):
        Ratio.of([1.0], [1.0])
