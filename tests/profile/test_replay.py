"""Decode steps drawn from a profile's sample and routed again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.profile.record import distinct_curve, draw_steps, replay
from leanmoe.profile.saved import Trace
from leanmoe.routing import BatchScope, route
from tests.profile.example import DOCUMENTS, EACH, EXPERTS, TOP_K, profile


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    tokens=st.integers(1, 20),
    steps=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_step_has_a_token_of_each_of_as_many_documents_as_possible(
    counts: list[int], tokens: int, steps: int, seed: int
) -> None:
    document_T = np.repeat(np.arange(len(counts), dtype=np.int32) * 3, counts)
    trace = Trace(np.zeros((1, len(document_T), 4), np.float16), document_T, document_T)
    if tokens > trace.tokens:
        with pytest.raises(LeanMoeError, match=f"tokens in a step is {tokens}: it must be 1 to"):
            draw_steps(trace, tokens, steps, seed)
        return
    places_SB = draw_steps(trace, tokens, steps, seed)
    assert places_SB.shape == (steps, tokens)
    assert torch.equal(places_SB, draw_steps(trace, tokens, steps, seed))
    for step in places_SB.tolist():
        times = np.bincount(document_T[step] // 3, minlength=len(counts))
        assert times.max() - times.min() <= 1
        if tokens <= len(counts) * min(counts):
            assert len(set(step)) == tokens


def test_every_token_comes_up_equally_often() -> None:
    trace = profile().trace
    drawn = draw_steps(trace, 4, 12_000).flatten()
    times = torch.bincount(drawn, minlength=trace.tokens).double()
    assert times.mean() == 100
    assert times.std() < 13  # Poisson: 10


def test_even_independent_use_is_the_uniform_formula() -> None:
    for point in distinct_curve(profile(bias=False), 0):
        assert point.uniform == distinct_uniform(EXPERTS, TOP_K, point.tokens)
        assert point.measured == pytest.approx(point.uniform, abs=4 * point.error + 0.15)
        assert point.documents == min(point.tokens, DOCUMENTS)


def test_rules_activate_what_they_say() -> None:
    made = profile()
    full = replay(made, 1, Rule(), 8)
    assert (full.slots, full.over_budget) == (TOP_K, 0.0)
    assert replay(made, 1, Rule(top_k=2), 8).slots == 2
    assert replay(made, 1, Rule(top_k=2), 8).distinct < full.distinct
    few = replay(made, 1, Rule(budget=6), 8)
    assert few.distinct <= 6 or few.over_budget > 0
    assert replay(made, 1, Rule(budget=1), 8).over_budget == 1.0
    scope = replay(made, 1, Rule(guaranteed=1), 8)
    assert scope.distinct == pytest.approx(replay(made, 1, Rule(top_k=1), 8).distinct)
    assert 1 < scope.slots <= TOP_K
    assert replay(made, 1, Rule(experts=(0, 3, 5, 7)), 64).distinct == 4


@pytest.mark.parametrize("rule", [Rule(guaranteed=2), Rule(budget_per_rank=3)])
def test_batch_scopes_and_ranks_are_counted_apart(rule: Rule) -> None:
    """Beside the reference routing, a batch scope at a time."""
    made, tokens, scopes, steps = profile(), 6, 2, 8
    placement = Placement.linear(EXPERTS, 4)
    found = replay(made, 1, rule, tokens, steps, 0, BatchScope(placement), scopes)
    assert made.bias_LE is not None
    bias_E = torch.from_numpy(made.bias_LE[1])
    logits_TE = torch.from_numpy(made.trace.logits_LTE[1]).float()
    distinct, most, slots = [], [], []
    for places_B in draw_steps(made.trace, tokens, steps, 0):
        active = set()
        for mine in places_B.chunk(scopes):
            routing = route(
                logits_TE[mine], made.router, TOP_K, rule, bias_E, scope=BatchScope(placement)
            )
            used = routing.ids_BTK[routing.ids_BTK < EXPERTS].tolist()
            active |= set(used)
            slots.append(len(used))
        distinct.append(len(active))
        most.append(max(sum(placement.rank_of[e] == rank for e in active) for rank in range(4)))
    assert found.distinct == pytest.approx(np.mean(distinct))
    assert found.most_loaded == pytest.approx(np.mean(most))
    assert found.slots == pytest.approx(sum(slots) / (steps * tokens))


def test_batch_scopes_share_a_step_evenly() -> None:
    with pytest.raises(LeanMoeError, match="scopes is 4: it must divide the 6 tokens"):
        replay(profile(), 0, Rule(guaranteed=1), 6, scopes=4)
    with pytest.raises(LeanMoeError, match="placement is of 8 experts"):
        replay(profile(), 0, Rule(guaranteed=1), 6, scope=BatchScope(Placement.linear(8, 2)))


def test_rules_are_compared_on_the_same_steps() -> None:
    made = profile()
    loose, tight = (replay(made, 0, Rule(threshold=t), 3, steps=2) for t in (1e-6, 1e-5))
    assert (loose.slots, loose.distinct) == (tight.slots, tight.distinct)


def test_more_steps_are_surer() -> None:
    made = profile()
    few, many = (replay(made, 0, Rule(), 4, steps=steps) for steps in (50, 5000))
    assert few.distinct_error == pytest.approx(10 * many.distinct_error, rel=0.3)
    assert few.distinct == pytest.approx(many.distinct, abs=4 * few.distinct_error)


@pytest.mark.parametrize(
    ("layer", "rule", "tokens", "message"),
    [
        (2, Rule(), 1, "layer is 2: it must be 0 to 1"),
        (0, Rule(budget=17), 1, "budget is 17"),
        (0, Rule(), DOCUMENTS * EACH + 1, "tokens in a step is 481: it must be 1 to 480"),
        (0, Rule(), 0, "tokens in a step is 0"),
    ],
)
def test_what_is_out_of_range_is_named(layer: int, rule: Rule, tokens: int, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        replay(profile(), layer, rule, tokens)
