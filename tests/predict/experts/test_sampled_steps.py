"""Sampled steps under batch-aware rules, beside the reference routing's counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.predict.experts.assumed import Assumed, assumed_curve
from leanmoe.predict.experts.curves import Curve
from leanmoe.predict.experts.sampled_steps import (
    ActiveMeans,
    Choices,
    SampledDemand,
    SampledSteps,
    ask,
    sample_demand,
    sampled_sizes,
)
from leanmoe.predict.experts.spread import ALONE, RankLayout, busiest
from leanmoe.routing import BatchScope, count_distinct_by_rank, count_slots, route

COUNTED = Path(__file__).parents[3] / "benchmarks/results"
ROUTER = Router(normalise=True)
GROUPED = Router(normalise=True, groups=2, groups_used=1, group_score="max")


@st.composite
def rules(draw: st.DrawFn) -> tuple[int, int, int, int, Rule]:
    """Experts, slots, ranks, tokens and a rule that shares experts."""
    experts = draw(st.integers(4, 24))
    slots = draw(st.integers(1, min(6, experts)))
    ranks = draw(st.integers(1, min(4, experts)))
    limits: dict[str, Any] = {
        "guaranteed": draw(st.none() | st.integers(1, slots)),
        "budget": draw(st.none() | st.integers(1, experts)),
        "budget_per_rank": draw(st.none() | st.integers(1, experts)),
    }
    if all(limit is None for limit in limits.values()):
        limits["budget"] = draw(st.integers(1, experts))
    return experts, slots, ranks, draw(st.integers(1, 20)), Rule(**limits)


@settings(max_examples=150, deadline=None)
@given(rules(), st.integers(0, 2**32 - 1), st.floats(0.1, 8))
def test_what_is_active_and_used_is_what_the_routing_counts(
    case: tuple[int, int, int, int, Rule], seed: int, spread: float
) -> None:
    experts, slots, ranks, tokens, rule = case
    draw = np.random.default_rng(seed)
    logits_BTE = spread * draw.normal(size=(6, tokens, experts))
    usable_BTG = None
    if experts % 2 == 0 and experts // 2 >= slots and seed % 2:  # a token may use one of two groups
        first_BT = draw.random((6, tokens)) < 0.5
        usable_BTG = np.stack([first_BT, ~first_BT], axis=-1)
        logits_BTE[~np.repeat(usable_BTG, experts // 2, axis=-1)] = -np.inf
    placement = Placement.linear(experts, ranks)
    router = ROUTER if usable_BTG is None else GROUPED
    usable = None if usable_BTG is None else torch.from_numpy(usable_BTG)
    asked = ask(logits_BTE, router, slots, rule.guaranteed)
    steps = SampledDemand(asked, usable, 6, slots).decide(rule, ranks)
    routed = route(
        torch.from_numpy(logits_BTE), router, slots, rule.on(ranks), scope=BatchScope(placement)
    )
    active_BR = count_distinct_by_rank(routed.ids_BTK, placement)
    counted = steps.on(ranks)
    assert counted.distinct == pytest.approx(float(active_BR.sum(1).double().mean()))
    assert counted.most_loaded == pytest.approx(float(active_BR.amax(1).double().mean()))
    slots_B = count_slots(routed.ids_BTK, experts)
    assert steps.slots == pytest.approx(float(slots_B.double().mean()) / tokens)


def test_experts_that_were_pruned_and_a_lower_top_k_are_not_asked_for_twice() -> None:
    """The curve samples the 32 experts that remain, whatever their ids in the model are."""
    remain = tuple(range(96, 128))
    pruned = Rule(top_k=4, budget=12, experts=remain)
    curve = assumed_curve(128, 8, pruned, Assumed())
    assert curve.experts == 32
    assert curve.at(64) == assumed_curve(32, 4, Rule(budget=12), Assumed()).at(64)


def sample_steps(
    choices: Choices, slots: int, rule: Rule, tokens: int, layout: RankLayout = ALONE, seed: int = 0
) -> SampledSteps:
    demand = sample_demand(choices, slots, rule.guaranteed, tokens, layout.scopes, seed)
    return demand.decide(rule, layout.ranks)


def drawn(
    choices: Choices, slots: int, rule: Rule, tokens: int, layout: RankLayout = ALONE, seed: int = 0
) -> ActiveMeans:
    return sample_steps(choices, slots, rule, tokens, layout, seed).on(layout.ranks)


def counted() -> list[dict[str, float]]:
    (path,) = COUNTED.glob("*-most-loaded-rank.json")
    rows = json.loads(path.read_text())["rows"]
    return [row for row in rows if row["routing"] == "uniform" and "budget" in row["rule"]]


@pytest.mark.parametrize("tokens", [8, 32, 128])
def test_budgets_are_as_the_reference_routing_counted_them(tokens: int) -> None:
    """128 experts, 8 a token, drawn evenly in `most_loaded_rank.py`: other draws, same counts."""
    choices = Choices(np.ones(128))
    rows = [row for row in counted() if row["tokens"] == tokens]
    assert rows
    for row in rows:
        ranks = int(row["ranks"])
        is_total = str(row["rule"]).startswith("budget=")
        rule = Rule(budget=48) if is_total else Rule(budget_per_rank=48 // ranks)
        found = [drawn(choices, 8, rule, tokens, RankLayout(ranks), seed) for seed in range(4)]
        distinct = np.mean([each.distinct for each in found])
        most_loaded = np.mean([each.most_loaded for each in found])
        assert distinct == pytest.approx(row["distinct"], rel=0.02)
        assert most_loaded == pytest.approx(row["most_loaded"], rel=0.03)


@pytest.mark.parametrize("rule", [Rule(budget=24), Rule(guaranteed=2, budget=30)], ids=str)
def test_steps_are_the_same_wherever_the_experts_are(rule: Rule) -> None:
    choices = Choices(np.ones(64), 8, 4, 0.5)
    for ranks in (1, 2, 8):
        scope = RankLayout(ranks, 2)
        once = sample_steps(choices, 6, rule, 32, replace(scope, ranks=1)).on(ranks)
        assert once == drawn(choices, 6, rule, 32, scope)


def test_ranks_that_decide_alone_activate_more_than_all_at_once() -> None:
    """Each of two ranks spends the budget on its own tokens' wishes."""
    choices = Choices(np.arange(1.0, 129.0) ** -0.5)
    rule, tokens = Rule(budget_per_rank=24), 16
    alone, common = (
        drawn(choices, 8, rule, tokens, RankLayout(2, 2, cross_rank))
        for cross_rank in (False, True)
    )
    assert common.most_loaded <= 24
    assert 24 < alone.most_loaded <= 48
    assert alone.distinct > 1.2 * common.distinct
    one = drawn(choices, 8, rule, tokens // 2, RankLayout(2))
    assert alone.slots == pytest.approx(one.slots, rel=0.02)
    two = drawn(choices, 8, rule, tokens, RankLayout(2))
    assert common.distinct == pytest.approx(two.distinct, rel=0.02)


def test_tokens_use_experts_of_their_own_groups() -> None:
    """One group of four, the same for all tokens: no more is active than it holds."""
    rule = Rule(budget=32)
    alike = drawn(Choices(np.ones(64), 4, 1, 1.0), 8, rule, 32)
    apart = drawn(Choices(np.ones(64), 4, 1, 0.0), 8, rule, 32)
    assert alike.distinct == pytest.approx(16, abs=0.1)
    assert apart.distinct == pytest.approx(32, abs=0.1)
    assert alike.slots == 8


@pytest.mark.parametrize("cross_rank", [False, True])
def test_a_rank_that_decides_alone_fills_up_from_fewer(cross_rank: bool) -> None:
    """As many are active, whoever decides; what a token may fill up with is not the same."""
    rule = Rule(guaranteed=3)

    def curve(scope: RankLayout) -> Curve:
        return assumed_curve(128, 8, rule, Assumed(), scope=scope)

    alone, several = curve(ALONE), curve(RankLayout(4, 4, cross_rank))
    distinct, slots = several.at(4)
    assert distinct == pytest.approx(alone.at(4)[0])
    assert slots == pytest.approx(8 if cross_rank else 3, abs=1e-9)
    assert several.exchanges_demand is cross_rank
    assert ("batch scope rank" in several.origin) is not cross_rank


def test_a_budget_per_rank_on_one_gpu_is_a_budget() -> None:
    one, other = (
        assumed_curve(64, 8, rule, Assumed())
        for rule in (Rule(budget_per_rank=20), Rule(budget=20))
    )
    assert one == other
    assert one.most_loaded_at(8) == one.at(8)[0]


def test_many_batch_scopes_are_sampled_to_fewer_tokens_each() -> None:
    assert sampled_sizes(ALONE)[-1] == sampled_sizes(RankLayout(4, 4))[-1] == 1024
    assert sampled_sizes(RankLayout(64, 64))[-1] == 64
    assert sampled_sizes(RankLayout(64, 1024))[-1] == 8
    assert sampled_sizes(RankLayout(64, 1024, cross_rank=True)) == sampled_sizes(ALONE)


def test_beyond_what_is_sampled_no_gpu_activates_more_than_it_holds() -> None:
    """Of 16 GPUs with 8 experts each, at 100,000 tokens."""
    rule = Rule(budget_per_rank=6)
    curve = assumed_curve(128, 8, rule, Assumed(skew=1.0), scope=RankLayout(16, 16))
    tokens = 1e5
    distinct, slots = curve.at(tokens)
    found = busiest(distinct, slots * tokens, 128, 16, curve.most_loaded_at(tokens))
    assert 7 < found.distinct <= 8
