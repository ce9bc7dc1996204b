"""route_cpu: the compiled routing against the loops and against `route`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from leanmoe.kernels.cpu.router import route_cpu, why_not_route_cpu
from leanmoe.plan import Rule
from leanmoe.routing import Routing, route, score
from tests.routing.cases import ROUTERS, Case, cases

PATIENT = settings(deadline=None, max_examples=300)
CLOSE = 1e-5
"""Experts this near one another may change places: exp is not torch's to the last bit."""


def both(case: Case) -> tuple[Routing, Routing]:
    arguments = (case.logits_BTE, case.router, case.top_k, case.rule, case.bias_E, case.padding_BT)
    assert why_not_route_cpu(case.logits_BTE, case.router, case.rule) is None
    return route(*arguments), route_cpu(*arguments)


def sets(routing: Routing) -> list[list[int]]:
    return routing.ids_BTK.sort(dim=-1)[0].flatten(0, -2).tolist()


def by_expert(routing: Routing, experts: int) -> Tensor:
    """Weights [S,T,E]; what the experts module makes of ids and weights in any order."""
    shape = (*routing.ids_BTK.shape[:-1], experts + 1)
    whole = torch.zeros(shape).scatter_add(-1, routing.ids_BTK, routing.weights_BTK)
    return whole[..., :experts]


def is_clear(case: Case) -> bool:
    """No token has two experts so close that the last bit of a score decides between them."""
    gates, ranking = score(case.logits_BTE, case.router, case.bias_E, case.rule.experts)
    if case.padding_BT is not None:
        ranking = ranking.masked_fill(case.padding_BT.unsqueeze(-1), float("-inf"))
    ordered = ranking.sort(dim=-1)[0]
    gaps = ordered.diff(dim=-1)
    return bool(((gaps > CLOSE) | gaps.isnan() | (ordered[..., 1:] <= 0)).all()) and bool(
        gates.nan_to_num().isfinite().all()
    )


@given(cases(hostile=False))
@PATIENT
def test_the_same_experts_and_weights_as_the_reference(case: Case) -> None:
    assume(is_clear(case))
    expected, found = both(case)
    assert sets(found) == sets(expected)
    torch.testing.assert_close(
        by_expert(found, case.experts), by_expert(expected, case.experts), atol=1e-5, rtol=1e-4
    )
    assert (found.over_budget_B is None) == (expected.over_budget_B is None)
    if expected.over_budget_B is not None:
        assert found.over_budget_B is not None
        assert found.over_budget_B.tolist() == expected.over_budget_B.tolist()


@given(cases())
@PATIENT
def test_hostile_scores_keep_every_promise(case: Case) -> None:
    _, found = both(case)
    ids, experts = found.ids_BTK, case.experts
    used = ids < experts
    assert bool(((ids >= 0) & (ids <= experts)).all())
    assert bool((found.weights_BTK[~used] == 0).all())
    assert bool(found.weights_BTK.isfinite().all())
    per_expert = torch.zeros((*ids.shape[:-1], experts + 1)).scatter_add(
        -1, ids, torch.ones(ids.shape)
    )
    assert bool((per_expert[..., :experts] <= 1).all()), "an expert twice in one token"
    if case.padding_BT is not None:
        assert not bool(used[case.padding_BT].any())
    if case.rule.experts is not None:
        assert set(ids[used].tolist()) <= set(case.rule.experts)
    if case.rule.budget is not None and found.over_budget_B is not None:
        for step, over in zip(ids, found.over_budget_B.tolist(), strict=True):
            distinct = len({e for e in step.flatten().tolist() if e < experts})
            assert over or distinct <= case.rule.budget


@given(cases())
@PATIENT
def test_logits_that_rank_as_they_are_give_the_reference_bit_for_bit(case: Case) -> None:
    guaranteed = case.rule.guaranteed or 1  # then the reference breaks ties by the lower id too
    rule = Rule(case.rule.top_k, guaranteed=guaranteed, experts=case.rule.experts)
    expected, found = both(replace(case, name="softmax after top-k", bias_E=None, rule=rule))
    assert found.ids_BTK.tolist() == expected.ids_BTK.tolist()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("rule", [Rule(top_k=2), Rule(guaranteed=2), Rule(budget=5)], ids=str)
def test_nan_in_a_token_is_nan_in_its_weights_and_in_no_other(name: str, rule: Rule) -> None:
    logits = torch.randn(1, 4, 32)
    logits[0, 1, 7] = float("nan")
    bias = None if ROUTERS[name].ranking_bias is None else torch.randn(32)
    weights = route_cpu(logits, ROUTERS[name], 4, rule, bias).weights_BTK
    assert weights[0].isnan().any(dim=-1).tolist() == [False, True, False, False]


def test_many_tokens_are_those_of_few() -> None:
    """More threads do not change what a token gets."""
    logits = torch.randn(700, 64)
    router, bias = ROUTERS["V3 groups"], torch.randn(64) * 0.1
    whole = route_cpu(logits, router, 8, Rule(top_k=5), bias)
    parts = [route_cpu(part, router, 8, Rule(top_k=5), bias) for part in logits.split(30)]
    assert whole.ids_BTK.tolist() == torch.cat([p.ids_BTK for p in parts]).tolist()
    assert torch.equal(whole.weights_BTK, torch.cat([p.weights_BTK for p in parts]))


def test_says_what_it_cannot_do() -> None:
    after = ROUTERS["softmax after top-k"]
    assert why_not_route_cpu(torch.randn(2, 8).bfloat16(), after, Rule(top_k=1)) is not None
    assert why_not_route_cpu(torch.randn(2, 8), after, Rule(top_k=0)) is not None
    for rule, reason in ((Rule(budget_per_rank=2), "budget_per_rank"), (Rule(budget=2), "None")):
        assert reason in str(why_not_route_cpu(torch.randn(2, 8), ROUTERS["softmax"], rule))
