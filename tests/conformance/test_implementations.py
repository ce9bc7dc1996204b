"""Whatever routes gives what `leanmoe.routing.route` gives, for every router, rule and mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import Routing, score
from leanmoe.routing.gate_weights import weigh
from leanmoe.routing.route import whole_top_k
from tests.conformance.cases import ROUTERS, Case, cases
from tests.conformance.implementations import (
    IMPLEMENTATIONS,
    IS_INTERPRETED,
    by_reference,
    one_step,
)

CLOSE = 1e-5
"""Experts this near one another may change places: exp is not torch's to the last bit."""
FIELDS: dict[str, Any] = {
    "top_k": 3,
    "threshold": 0.317,
    "top_p": 0.613,
    "guaranteed": 2,
    "budget": 5,
    "budget_per_rank": 3,
    "experts": tuple(range(1, 24)),
    "renormalise": 0.5,
}
"""Every field of a rule, with a value that changes what 9 tokens get of 32 experts."""
PAIRS = [*((name,) for name in FIELDS), *combinations(FIELDS, 2)]
EXPERTS, TOKENS, TOP_K = 32, 9, 4
EVERY = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def by_expert(routing: Routing, experts: int) -> Tensor:
    """Weights (...,T,E): what the experts make of ids and weights in any order."""
    shape = (*routing.ids_BTK.shape[:-1], experts + 1)
    whole = torch.zeros(shape)
    return whole.scatter_add(-1, routing.ids_BTK.long(), routing.weights_BTK.float())[..., :experts]


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


def check_same(name: str, case: Case) -> None:
    """One implementation's routing of a case it supports against the reference's."""
    implementation = IMPLEMENTATIONS[name]
    wanted, routed = by_reference(case), implementation.route(case)
    experts = case.experts
    torch.testing.assert_close(
        by_expert(routed, experts), by_expert(wanted, experts), atol=1e-5, rtol=1e-4
    )
    if implementation.repeats:
        return
    if name == "loops" and case.rule.is_batch_aware:
        assert routed.ids_BTK.tolist() == wanted.ids_BTK.tolist(), "not in the same order"
    assert routed.ids_BTK.sort(dim=-1)[0].tolist() == wanted.ids_BTK.sort(dim=-1)[0].tolist()
    assert (routed.over_budget_B is None) == (wanted.over_budget_B is None)
    if routed.over_budget_B is not None and wanted.over_budget_B is not None:
        assert routed.over_budget_B.tolist() == wanted.over_budget_B.tolist()


def check_promises(name: str, case: Case) -> None:
    """What holds whatever the last bit of a score decides, and for equal scores too."""
    routed = IMPLEMENTATIONS[name].route(case)
    ids, experts = routed.ids_BTK, case.experts
    used = (ids < experts) & ((routed.weights_BTK > 0) | (not IMPLEMENTATIONS[name].repeats))
    assert bool(((ids >= 0) & (ids <= experts)).all())
    assert bool((routed.weights_BTK[~used] == 0).all())
    assert bool(routed.weights_BTK.isfinite().all())
    check_weights(case, routed, used)
    counts = torch.zeros((*ids.shape[:-1], experts + 1)).scatter_add(-1, ids, used.float())
    assert bool((counts[..., :experts] <= 1).all()), "an expert twice in one token"
    if not IMPLEMENTATIONS[name].repeats:
        assert bool((used[..., 1:] <= used[..., :-1]).all()), "a skipped slot before a used one"
    if case.padding_BT is not None:
        assert not bool(used[case.padding_BT].any())
    if case.rule.experts is not None:
        assert set(ids[used].tolist()) <= set(case.rule.experts)
    if case.rule.budget is not None and routed.over_budget_B is not None:
        over = routed.over_budget_B.reshape(-1).tolist()
        weighted = experts - case.router.zero_experts
        for step, is_over in zip(ids.reshape(len(over), -1), over, strict=True):
            active = {expert for expert in step.tolist() if expert < weighted}
            assert is_over or len(active) <= case.rule.budget


def check_weights(case: Case, routed: Routing, used_BTK: Tensor) -> None:
    """The used slots weigh what their gates say, whichever of equal experts they are."""
    rule, router = case.rule, case.router
    if rule.renormalise < 1 and (case.bias_E is not None or router.limits_groups):
        return  # experts that rank equally, in a top-k or a group, may have different gates
    scores = score(case.logits_BTE, router, case.bias_E, rule.experts)
    gates_BTK = scores.gates_BTE.gather(-1, routed.ids_BTK.clamp(max=case.experts - 1))
    whole = whole_top_k(scores, case.top_k, router, rule.renormalise)
    wanted_BTK = weigh(gates_BTK, router, used_BTK, whole)
    is_sure_BT = gates_BTK.masked_fill(~used_BTK, 0).abs().sum(dim=-1) > 1e-30  # no underflow
    torch.testing.assert_close(
        routed.weights_BTK[is_sure_BT], wanted_BTK[is_sure_BT], atol=1e-5, rtol=1e-3
    )


def check_random(name: str, check: Callable[[str, Case], None], **drawn: Any) -> None:
    """`check` on random cases that the implementation supports."""
    implementation = IMPLEMENTATIONS[name]

    @settings(
        deadline=None,
        max_examples=implementation.examples,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        database=None,
    )
    @given(cases(**drawn))
    def run(case: Case) -> None:
        case = case if implementation.takes_steps else one_step(case)
        assume(implementation.unsupported(case) is None)
        assume(check is not check_same or is_clear(case))
        check(name, case)

    run()


@EVERY
def test_random_cases_are_routed_as_by_the_reference(name: str) -> None:
    check_random(name, check_same, hostile=False)


@pytest.mark.parametrize("name", ["loops", "vllm"])
def test_random_ranks_are_routed_as_by_the_reference(name: str) -> None:
    """Triton's ranks have tests of their own: tests/kernels/triton/test_router.py."""
    check_random(name, check_same, hostile=False, placed=True)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "loops"])
def test_ties_and_saturated_scores_keep_every_promise(name: str) -> None:
    check_random(name, check_promises)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_equal_logits_go_to_the_lower_id(name: str) -> None:
    def check(name: str, case: Case) -> None:
        guaranteed = case.rule.guaranteed or 1  # then the reference orders ties by id, too
        rule = Rule(case.rule.top_k, guaranteed=guaranteed, experts=case.rule.experts)
        case = replace(case, name="softmax after top-k", bias_E=None, rule=rule)
        routed = IMPLEMENTATIONS[name].route(case)
        assert routed.ids_BTK.tolist() == by_reference(case).ids_BTK.tolist()

    check_random(name, check)


@EVERY
@pytest.mark.parametrize("fields", PAIRS, ids=" and ".join)
def test_every_field_and_every_pair_of_fields(name: str, fields: tuple[str, ...]) -> None:
    """Each with every router; in the interpreter with few tokens and one router a pair."""
    routers, tokens = list(ROUTERS), TOKENS
    if name == "triton" and IS_INTERPRETED:
        routers, tokens = [routers[PAIRS.index(fields) % len(routers)]], 5
    rule = Rule(**{field: FIELDS[field] for field in fields})
    placement = Placement.linear(EXPERTS, 2) if "budget_per_rank" in fields else None
    generator = torch.Generator().manual_seed(PAIRS.index(fields))
    reasons = []
    for router in routers:
        bias_E = torch.randn(EXPERTS, generator=generator) * 0.1
        has_bias = ROUTERS[router].ranking_bias is not None
        logits_BTE = torch.randn(1, tokens, EXPERTS, generator=generator)
        padding_BT = torch.arange(tokens)[None] == tokens - 1
        logits_BTE[padding_BT] = float("nan")
        case = Case(
            router, logits_BTE, bias_E if has_bias else None, padding_BT, TOP_K, rule, placement
        )
        case = case if IMPLEMENTATIONS[name].takes_steps else one_step(case)
        reasons.append(IMPLEMENTATIONS[name].unsupported(case))
        if reasons[-1] is None:
            check_same(name, case)
    if None not in reasons:
        pytest.skip(str(reasons[0]))


@EVERY
@pytest.mark.parametrize("router", ["softmax, normalised", "softmax after top-k", "V3 groups"])
@pytest.mark.parametrize("renormalise", [0.0, 0.25, 0.5, 1.0])
def test_weights_are_shares_of_what_renormalise_says(
    name: str, router: str, renormalise: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    logits_TE = torch.randn(4, EXPERTS, generator=generator)
    bias_E = torch.randn(EXPERTS, generator=generator) * 0.1
    has_bias = ROUTERS[router].ranking_bias is not None
    for shares in ({"guaranteed": 1}, {"threshold": 0.317}):
        rule = Rule(3, renormalise=renormalise, **shares)
        case = Case(router, logits_TE[None], bias_E if has_bias else None, None, TOP_K, rule)
        case = case if IMPLEMENTATIONS[name].takes_steps else one_step(case)
        if reason := IMPLEMENTATIONS[name].unsupported(case):
            pytest.skip(reason)
        check_same(name, case)


MANY_EXPERTS = 896
"""As many as Kimi-K3 has, no power of two."""
MANY_RULES = [
    Rule(top_k=5),
    Rule(threshold=0.613),
    Rule(guaranteed=3),
    Rule(top_p=0.613, budget=24),
    Rule(experts=tuple(range(0, MANY_EXPERTS, 3)), guaranteed=2, budget=30),
]


@EVERY
@pytest.mark.parametrize("rule", MANY_RULES, ids=str)
def test_many_experts(name: str, rule: Rule) -> None:
    routers = ["softmax, normalised", "sigmoid with a bias", "V3 groups"]
    if name == "triton" and IS_INTERPRETED:
        routers = [routers[MANY_RULES.index(rule) % len(routers)]]
    generator = torch.Generator().manual_seed(1)
    reasons = []
    for router in routers:
        logits_TE = torch.randn(6, MANY_EXPERTS, generator=generator)
        bias_E = torch.randn(MANY_EXPERTS, generator=generator) * 0.1
        has_bias = ROUTERS[router].ranking_bias is not None
        case = Case(router, logits_TE, bias_E if has_bias else None, None, 16, rule)
        if IMPLEMENTATIONS[name].takes_steps:
            case = replace(case, logits_BTE=logits_TE[None])
        reasons.append(IMPLEMENTATIONS[name].unsupported(case))
        if reasons[-1] is None:
            check_same(name, case)
    if None not in reasons:
        pytest.skip(str(reasons[0]))


@pytest.mark.parametrize("name", ["cpu", "triton", "vllm", "sglang"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("rule", [Rule(top_k=2), Rule(guaranteed=2), Rule(budget=5)], ids=str)
def test_nan_in_a_token_is_nan_in_its_weights_and_in_no_other(
    name: str, router: str, rule: Rule
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4, EXPERTS, generator=generator)
    logits_TE[1, 7] = float("nan")
    has_bias = ROUTERS[router].ranking_bias is not None
    bias_E = torch.randn(EXPERTS, generator=generator) if has_bias else None
    case = Case(router, logits_TE, bias_E, None, 4, rule)
    if reason := IMPLEMENTATIONS[name].unsupported(case):
        pytest.skip(reason)
    weights = IMPLEMENTATIONS[name].route(case)
    assert weights.weights_BTK.isnan().any(dim=-1).tolist() == [False, True, False, False]
