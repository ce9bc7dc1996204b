"""How many experts are active: formulas against drawing every token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import distinct_grouped, distinct_uniform
from leanmoe.plan import Rule
from leanmoe.predict.experts.assumed import (
    Assumed,
    Pool,
    assumed_curve,
    grouped_distinct,
    inclusion,
)


def routed(
    draw: np.random.Generator, tokens: int, experts: int, k: int, groups: int, used: int
) -> list[set[int]]:
    """DeepSeek-V3's router, one token at a time: groups by the sum of their best two scores."""
    found = []
    size = experts // groups
    for _ in range(tokens):
        score_E = draw.random(experts)
        best_G = [sum(sorted(score_E[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -best_G[g])[:used]
        reachable = [e for g in allowed for e in range(g * size, (g + 1) * size)]
        found.append(set(sorted(reachable, key=lambda e: -score_E[e])[:k]))
    return found


@pytest.mark.parametrize(("groups", "used"), [(1, 1), (8, 4), (8, 2)])
def test_independent_tokens_activate_what_the_plain_formula_says_whatever_the_groups(
    groups: int, used: int
) -> None:
    draw = np.random.default_rng(1)
    counts = [len(set().union(*routed(draw, 12, 64, 6, groups, used))) for _ in range(300)]
    mean, error = np.mean(counts), float(np.std(counts)) / math.sqrt(len(counts))
    assert mean == pytest.approx(distinct_uniform(64, 6, 12), abs=4 * error)


def test_tokens_that_agree_on_groups_activate_fewer_down_to_full_agreement() -> None:
    values = [
        grouped_distinct(Pool(256, 8, 4), 8, 64, Assumed(agreement=a)) for a in (0.0, 0.5, 0.9, 1.0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(distinct_uniform(256, 8, 64), rel=0.02)
    assert values[-1] == pytest.approx(distinct_grouped(256, 8, 64, 8, 4), rel=0.02)


@given(st.integers(4, 64), st.floats(0.5, 1.0), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_inclusion_sums_to_k_and_no_chance_is_above_one(
    experts: int, share: float, skew: float
) -> None:
    k = max(1, int(experts * share))
    chance_E = inclusion(experts, k, skew)
    assert chance_E.sum() == pytest.approx(k)
    assert (chance_E <= 1 + 1e-12).all()
    assert (np.diff(chance_E) <= 1e-12).all()


def test_a_skewed_router_activates_fewer() -> None:
    even = assumed_curve(128, 8, Rule(), Assumed())
    skewed = assumed_curve(128, 8, Rule(), Assumed(skew=1.0))
    assert skewed.at(32)[0] < 0.8 * even.at(32)[0]


@pytest.mark.parametrize("groups_used", [8, 4])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
def test_guaranteed_fills_up_from_the_experts_that_are_active(
    tokens: int, groups_used: int
) -> None:
    """Beside steps drawn: a token takes active experts of its groups, however far down it ranks."""
    draw = np.random.default_rng(2)
    experts, k, first, groups = 128, 8, 3, 8
    distinct, slots = [], []
    for _ in range(200):
        orders = []
        for _ in range(tokens):
            order = draw.permutation(experts)
            mine = draw.permutation(groups)[:groups_used]
            orders.append(order[np.isin(order // (experts // groups), mine)])
        union = set().union(*(set(order[:first]) for order in orders))
        distinct.append(len(union))
        slots.append(np.mean([min(k, sum(e in union for e in order)) for order in orders]))
    rule = Rule(guaranteed=first)
    curve = assumed_curve(experts, k, rule, Assumed(), groups, groups_used)
    found = curve.at(tokens)
    assert found[0] == pytest.approx(np.mean(distinct), rel=0.03)
    # The mean of what is cut off at k is a little below what is left of the mean.
    assert found[1] == pytest.approx(np.mean(slots), rel=0.08)


def test_tokens_that_agree_on_their_groups_may_use_all_that_is_active() -> None:
    rule, k = Rule(guaranteed=3), 8
    apart = assumed_curve(128, k, rule, Assumed(), 8, 4).at(2)
    alike = assumed_curve(128, k, rule, Assumed(agreement=1.0), 8, 4).at(2)
    assert apart[1] < apart[0]
    assert alike[1] == pytest.approx(alike[0])


def test_a_budget_is_filled_up_to_k_and_every_tokens_best_stays() -> None:
    curve = assumed_curve(64, 8, Rule(budget=20), Assumed())
    assert curve.at(8) == (20, 8)
    assert curve.at(512)[0] == pytest.approx(64, abs=0.1)
    distinct, slots = assumed_curve(64, 8, Rule(budget=4), Assumed()).at(4)
    assert distinct == pytest.approx(4, abs=0.1)
    assert slots == distinct


def test_rules_bound_what_is_active() -> None:
    assert assumed_curve(64, 8, Rule(budget=20), Assumed()).at(16)[0] == 20
    assert assumed_curve(64, 8, Rule(top_k=0), Assumed()).at(512) == (0.0, 0.0)
    pruned = assumed_curve(64, 8, Rule(experts=tuple(range(16))), Assumed())
    assert pruned.experts == 16
    assert pruned.at(10_000)[0] == pytest.approx(16)


@pytest.mark.parametrize("rule", [Rule(threshold=0.5), Rule(top_p=0.9)])
def test_a_rule_that_depends_on_text_needs_a_profile(rule: Rule) -> None:
    with pytest.raises(LeanMoeError, match="give a profile"):
        assumed_curve(64, 8, rule, Assumed())


@pytest.mark.parametrize("assumed", [Assumed(skew=-1), Assumed(agreement=1.5)])
def test_assumptions_out_of_range(assumed: Assumed) -> None:
    with pytest.raises(LeanMoeError, match="it must be 0 to"):
        assumed_curve(64, 8, Rule(), assumed)
