"""Paired statistics: against textbook numbers, and by how often they are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import Margin
from leanmoe.stats import paired
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import fixed_sequence, holm

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
    assert paired.non_inferior(full, full, Margin(0.001)).accepted


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


def clustered(draw: np.random.Generator, sources: int) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """(change, loss, source) of documents, 1 to 9 a source, whose harm has an ICC of 0.3 in it."""
    source_U = np.repeat(np.arange(sources), draw.integers(1, 10, sources))
    tokens = np.maximum(np.exp(0.7 * draw.standard_normal(len(source_U))) * 300, 16)
    shared, own = math.sqrt(0.3), math.sqrt(0.7)
    odd = shared * draw.standard_normal(sources)[source_U]
    harm = TRUE_LOSS * (1 + odd + own * draw.standard_normal(len(source_U)))
    return harm * 3.3 * tokens, 3.3 * tokens, source_U


def test_documents_of_a_source_do_not_count_as_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "REPLICATES", 500)
    draw = np.random.default_rng(3)
    accepted = naive = 0
    for _ in range(TRIALS):
        change_U, base_U, source_U = clustered(draw, 40)
        by_source = paired.ratio_of_sums(change_U, base_U, units_U=source_U)
        accepted += by_source.upper_bound <= TRUE_LOSS
        naive += paired.ratio_of_sums(change_U, base_U).upper_bound <= TRUE_LOSS
    assert accepted <= 0.05 * TRIALS + 11
    assert naive > 0.09 * TRIALS, "as documents they are taken for more than they are"
    assert (by_source.sources, by_source.documents) == (40, len(base_U))


def test_the_sum_of_a_source_is_all_that_counts_of_it() -> None:
    draw = np.random.default_rng(4)
    change_U, base_U, source_U = clustered(draw, 30)
    found = paired.ratio_of_sums(change_U, base_U, units_U=source_U)
    change, base = (np.bincount(source_U, x).astype(np.float64) for x in (change_U, base_U))
    summed = paired.ratio_of_sums(change, base)
    assert (found.low, found.upper_bound) == pytest.approx((summed.low, summed.upper_bound))


def test_harm_in_one_document_of_fifty_is_seen_by_150_and_by_no_test_of_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paired, "REPLICATES", 500)
    assert paired.rarest_harm_seen(149) < 0.02 < paired.rarest_harm_seen(148)
    draw = np.random.default_rng(6)
    accepted = 0
    for _ in range(TRIALS):
        harm_U = (draw.random(200) < 0.02) * TRUE_LOSS / 0.02
        accepted += (
            paired.ratio_of_sums(harm_U + draw.normal(0, 0.002, 200), np.ones(200)).upper_bound
            <= TRUE_LOSS
        )
    assert accepted <= 0.05 * TRIALS + 11


def test_what_batches_add_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harm that a draw of the batches shares over all documents is seen over the draws alone."""
    monkeypatch.setattr(paired, "REPLICATES", 500)
    draw = np.random.default_rng(7)
    accepted = 0
    for _ in range(TRIALS):
        shared_Z1 = draw.normal(0, 0.002, (3, 1))
        change_ZU = TRUE_LOSS + shared_Z1 + draw.normal(0, 0.01, 60)
        accepted += paired.ratio_of_sums(change_ZU, np.ones(60)).upper_bound <= TRUE_LOSS
    assert accepted <= 0.05 * TRIALS + 11
    one, same = change_ZU[0], np.stack([change_ZU[0]] * 3)
    assert paired.ratio_of_sums(same, np.ones(60)) == paired.ratio_of_sums(one, np.ones(60))
    wider = paired.ratio_of_sums(change_ZU, np.ones(60))
    assert wider.high - wider.low > paired.ratio_of_sums(one, np.ones(60)).high - one.mean()


@pytest.mark.parametrize("correlation", [0.95, 0.0])
def test_three_loads_in_one_sequence_err_as_often_as_one_test(
    correlation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of three loads at the margin: any accepted is an error; kept apart there were more."""
    monkeypatch.setattr(paired, "REPLICATES", 500)
    draw = np.random.default_rng(8)
    in_sequence = apart = 0
    for _ in range(TRIALS):
        shared_U = draw.normal(0, math.sqrt(correlation), 40)
        bounds = [
            paired.ratio_of_sums(
                TRUE_LOSS + 0.01 * (shared_U + draw.normal(0, math.sqrt(1 - correlation), 40)),
                np.ones(40),
            ).upper_bound
            for _ in range(3)
        ]
        in_sequence += bool(fixed_sequence(bounds, lambda bound: bound <= TRUE_LOSS))
        apart += min(bounds) <= TRUE_LOSS
    assert in_sequence <= 0.05 * TRIALS + 11
    assert apart > in_sequence


@pytest.mark.parametrize("correlation", [0.95, 0.0])
def test_each_of_three_margins_errs_as_often_as_one_test(
    correlation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One order of plans, of which one loses just each margin: a level's own claim is at 95%.

    That some level of the three is wrong is more frequent, and what is claimed says so.
    """
    monkeypatch.setattr(paired, "REPLICATES", 300)
    draw, margins = np.random.default_rng(9), (0.002, 0.005, 0.01)
    wrong, some_wrong = dict.fromkeys(margins, 0), 0
    for _ in range(TRIALS):
        shared_U = draw.normal(0, math.sqrt(correlation), 40)
        bounds = [
            paired.ratio_of_sums(
                loss + 0.004 * (shared_U + draw.normal(0, math.sqrt(1 - correlation), 40)),
                np.ones(40),
            ).upper_bound
            for loss in margins
        ]
        accepted = {m: fixed_sequence(bounds, lambda bound: bound <= m) for m in margins}  # noqa: B023
        errors = [len(accepted[m]) > place for place, m in enumerate(margins)]
        some_wrong += any(errors)
        for margin, error in zip(margins, errors, strict=True):
            wrong[margin] += error
        assert len(accepted[0.002]) <= len(accepted[0.005]) <= len(accepted[0.01])
    assert max(wrong.values()) <= 0.05 * TRIALS + 11
    assert max(wrong.values()) < some_wrong <= 0.15 * TRIALS + 18


def test_a_margin_in_nats_is_judged_in_nats() -> None:
    full, plan = some_losses(60, 0.002)
    increase = paired.loss_increase(full, plan, in_nats=True)
    assert increase.ratio == pytest.approx(plan.mean - full.mean)
    within = paired.non_inferior(full, plan, Margin(increase.upper_bound + 1e-6, in_nats=True))
    assert within.accepted
    assert "nats, at most +" in within.reason
    assert not paired.non_inferior(full, plan, Margin(increase.upper_bound - 1e-6, True)).accepted


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
    within = paired.non_inferior(full, plan, Margin(0.005))
    assert within.accepted
    assert "within the margin of 0.5%" in within.reason
    short = paired.non_inferior(full, plan, Margin(within.loss.ratio + 1e-4))
    assert not short.accepted
    assert "independent documents like these would show" in short.reason
    beyond = paired.non_inferior(full, plan, Margin(within.loss.ratio - 1e-4))
    assert not beyond.accepted
    assert "documents" not in beyond.reason


def test_too_few_documents_say_how_many_are_needed() -> None:
    full, plan = some_losses(19, 0.0)
    with pytest.raises(LeanMoeError, match=r"19 independent ones .* 20 needed"):
        paired.loss_increase(full, plan)
    full, plan = some_losses(20, 0.0)
    paired.loss_increase(full, plan)
    with pytest.raises(LeanMoeError, match=r"20 independent ones .* 100 needed"):
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


@dataclass(frozen=True)
class ByItsP:
    """A verdict that accepts where its p is within its part of 5%."""

    p: float
    sharing: int

    @property
    def accepted(self) -> bool:
        return self.p <= 0.05 / self.sharing


def holms(ps: Sequence[float]) -> list[bool]:
    return [each.accepted for each in holm([partial(ByItsP, p) for p in ps])]


def test_holm_is_that_of_the_paper() -> None:
    """The smallest p at a third of the error, the next at half: Holm 1979, section 3."""
    assert holms([0.02, 0.01, 0.04]) == [True, True, True]
    assert holms([0.026, 0.01, 0.04]) == [False, True, False]
    assert holms([0.02, 0.02, 0.02]) == [False, False, False]
    assert holms([0.04]) == [True]
    assert holms([]) == []


def test_holm_accepts_any_wrongly_as_rarely_as_one_test() -> None:
    draw = np.random.default_rng(4)
    alone = together = 0
    for _ in range(TRIALS):
        bad = draw.random(8)  # eight plans at the margin, and two that are surely good
        alone += bool((bad <= 0.05).any())
        together += any(holms([0.0, *bad, 0.0])[1:-1])
    assert alone / TRIALS > 0.25
    assert together / TRIALS <= 0.07


def test_a_bound_that_shares_the_error_is_that_of_a_smaller_one() -> None:
    full, plan = some_losses(100, TRUE_LOSS)
    alone = paired.non_inferior(full, plan, Margin(0.0062))
    bound = paired.loss_increase(full, plan, confidence=1 - 0.05 / 4).upper_bound
    margin = Margin((alone.loss.upper_bound + bound) / 2)
    assert paired.non_inferior(full, plan, margin).accepted
    shared = paired.non_inferior(full, plan, margin, sharing=4)
    assert not shared.accepted
    assert shared.loss.judged == pytest.approx(bound)
    assert shared.loss.upper_bound == alone.loss.upper_bound
    assert f"{bound:+.2%} where 4 verdicts share the error" in shared.reason
