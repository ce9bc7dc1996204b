"""route(): what must hold for any router, rule and logits; tests/conformance has the loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from leanmoe.models.families import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import (
    BatchScope,
    Routing,
    count_distinct,
    count_distinct_by_rank,
    count_slots,
    route,
    score,
)
from leanmoe.runtime import shape_of
from tests import tiny
from tests.conformance.cases import ROUTERS, Case, cases
from tests.conformance.implementations import by_loops
from tests.models.test_families import routed as routed_by_family

FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "lfm2_moe",
    "minimax",
    "mistral4",
    "mixtral",
    "olmoe",
    "qwen3_moe",
]
PATIENT = settings(deadline=None)  # a call's time says nothing on a busy machine


def routed(case: Case) -> Routing:
    scope = BatchScope(case.placement)
    return route(
        case.logits_BTE, case.router, case.top_k, case.rule, case.bias_E, case.padding_BT, scope
    )


def steps(case: Case, routing: Routing) -> list[list[list[int]]]:
    """The expert ids that each token of each step uses."""
    return [
        [[expert for expert in slots if expert < case.experts] for slots in step]
        for step in routing.ids_BTK.tolist()
    ]


def padding(case: Case) -> Tensor:
    if case.padding_BT is None:
        return torch.zeros(case.logits_BTE.shape[:2], dtype=torch.bool)
    return case.padding_BT


def ranking(case: Case) -> Tensor:
    return score(case.logits_BTE, case.router, case.bias_E, case.rule.experts).ranking_BTE


@given(cases(scope=True))
@PATIENT
def test_shared_experts_are_those_of_the_loops(case: Case) -> None:
    assume(case.rule.budget is None)  # rounding of votes decides ties: test_batch_rules has them
    assert steps(case, routed(case)) == steps(case, by_loops(case))


@given(cases(placed=True))
@PATIENT
def test_no_rank_exceeds_its_budget_but_for_its_tokens_bests(case: Case) -> None:
    assert case.placement is not None
    assert case.rule.budget_per_rank is not None
    routing = routed(case)
    active_BR = count_distinct_by_rank(routing.ids_BTK, case.placement)
    bests_BR = count_distinct_by_rank(routing.ids_BTK[..., :1], case.placement)
    if not case.router.zero_experts:  # a rank may have any number of experts that cost nothing
        assert (active_BR <= bests_BR.clamp(min=case.rule.budget_per_rank)).all()
    assert torch.equal(active_BR.sum(dim=-1), count_distinct(routing.ids_BTK, case.experts))


@given(cases(placed=True))
@PATIENT
def test_on_one_rank_the_budget_per_rank_is_a_budget(case: Case) -> None:
    one = replace(case, placement=None)
    same = replace(one, rule=case.rule.on(1))
    assert same.rule.budget_per_rank is None
    assert same.rule.budget is not None
    linear = replace(one, placement=Placement.linear(case.experts, 1))
    for other in (same, linear):
        assert routed(other).ids_BTK.tolist() == routed(one).ids_BTK.tolist()
        assert torch.equal(routed(other).weights_BTK, routed(one).weights_BTK)


@given(cases())
@PATIENT
def test_only_usable_experts_each_once_and_never_more_than_top_k(case: Case) -> None:
    routing, ranks = routed(case), ranking(case)
    assert routing.ids_BTK.shape == routing.weights_BTK.shape
    assert routing.ids_BTK.shape == (*case.logits_BTE.shape[:2], case.slots)
    assert routing.ids_BTK.dtype == torch.int64
    for number, step in enumerate(steps(case, routing)):
        for token, experts in enumerate(step):
            assert len(set(experts)) == len(experts) <= case.slots
            assert case.rule.experts is None or set(experts) <= set(case.rule.experts)
            if experts:
                assert ranks[number, token, experts].min() > float("-inf")
            elif not padding(case)[number, token]:
                pytest.fail("a token has no expert at all")


@given(cases())
@PATIENT
def test_padding_uses_nothing_and_changes_nothing_for_others(case: Case) -> None:
    routing = routed(case)
    assert (routing.ids_BTK[padding(case)] == case.experts).all()
    assert (routing.weights_BTK[padding(case)] == 0).all()
    for number, is_padding in enumerate(padding(case)):
        real = case.logits_BTE[number, ~is_padding]
        alone = route(real, case.router, case.top_k, case.rule, case.bias_E)
        assert torch.equal(routing.ids_BTK[number, ~is_padding], alone.ids_BTK)
        torch.testing.assert_close(routing.weights_BTK[number, ~is_padding], alone.weights_BTK)


@given(cases(scope=True))
@PATIENT
def test_each_token_keeps_its_best(case: Case) -> None:
    own = route(
        case.logits_BTE,
        case.router,
        case.top_k,
        Rule(case.slots, case.rule.threshold, case.rule.top_p, case.slots, None, case.rule.experts),
        case.bias_E,
        case.padding_BT,
    )
    surely = 1 if case.rule.budget is not None else case.rule.guaranteed
    for kept, best in zip(steps(case, routed(case)), steps(case, own), strict=True):
        for token, experts in zip(kept, best, strict=True):
            assert token[:surely] == experts[:surely]


@given(cases(scope=True))
@PATIENT
def test_budget_holds_unless_bests_alone_exceed_it(case: Case) -> None:
    routing = routed(case)
    if case.rule.budget is None:
        assert routing.over_budget_B is None
        return
    assert routing.over_budget_B is not None
    weighted = case.experts - case.router.zero_experts
    counted_BTK = routing.ids_BTK.clamp(max=weighted)
    distinct = count_distinct(counted_BTK, weighted)
    bests = count_distinct(counted_BTK[..., :1], weighted)
    assert torch.equal(routing.over_budget_B, bests > case.rule.budget)
    assert (distinct <= bests.clamp(min=case.rule.budget)).all()


@given(cases(scope=True))
@PATIENT
def test_sharing_wakes_no_more_experts_and_no_more_slots(case: Case) -> None:
    alone = Rule(
        case.slots, case.rule.threshold, case.rule.top_p, case.slots, None, case.rule.experts
    )
    own = route(case.logits_BTE, case.router, case.top_k, alone, case.bias_E, case.padding_BT)
    routing = routed(case)
    for count in (count_distinct, count_slots):
        assert (count(routing.ids_BTK, case.experts) <= count(own.ids_BTK, case.experts)).all()


@given(cases())
@PATIENT
def test_weights_are_the_gates_normalised_as_the_model_does_it(case: Case) -> None:
    routing = routed(case)
    gates = score(case.logits_BTE, case.router, experts=case.rule.experts).gates_BTE
    for number, step in enumerate(steps(case, routing)):
        for token, experts in enumerate(step):
            used = routing.ids_BTK[number, token] < case.experts
            weights = routing.weights_BTK[number, token]
            assert (weights[~used] == 0).all()
            own = gates[number, token, routing.ids_BTK[number, token, used]]
            a = case.rule.renormalise
            ranked, best = ranking(case)[number, token].topk(case.top_k)
            whole = gates[number, token, best[ranked > float("-inf")]] if a < 1 else own
            if case.router.scoring == "softmax_after_top_k" and experts:
                own = (own - a * own.logsumexp(-1) - (1 - a) * whole.logsumexp(-1)).exp()
            elif case.router.normalise and experts:
                epsilon = case.router.normalise_epsilon
                total = (own.sum() + epsilon) ** a * (whole.sum() + epsilon) ** (1 - a)
                own = own / total if total > 0 else own
            torch.testing.assert_close(weights[used], own * case.router.scaling)


def test_kept_weights_are_those_beside_the_whole_top_k() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    full = route(logits, Router(normalise=True), 3, Rule()).weights_BTK
    fewer = route(logits, Router(normalise=True), 3, Rule(top_k=2, renormalise=0.0)).weights_BTK
    torch.testing.assert_close(fewer, full[:, :2])
    anew = route(logits, Router(normalise=True), 3, Rule(top_k=2)).weights_BTK
    assert (anew > fewer).all()


@given(cases())
@PATIENT
def test_permuting_the_batch_permutes_the_result(case: Case) -> None:
    tokens = case.logits_BTE.shape[1]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
    moved = None if case.padding_BT is None else case.padding_BT[:, order]
    routing = routed(case)
    permuted = route(
        case.logits_BTE[:, order], case.router, case.top_k, case.rule, case.bias_E, moved
    )
    assert torch.equal(permuted.ids_BTK, routing.ids_BTK[:, order])
    torch.testing.assert_close(permuted.weights_BTK, routing.weights_BTK[:, order])
    if routing.over_budget_B is not None:
        assert permuted.over_budget_B is not None
        assert torch.equal(permuted.over_budget_B, routing.over_budget_B)


@given(cases())
@PATIENT
def test_a_step_alone_is_routed_as_among_others(case: Case) -> None:
    routing = routed(case)
    for number, logits in enumerate(case.logits_BTE):
        pad = None if case.padding_BT is None else case.padding_BT[number]
        alone = route(logits, case.router, case.top_k, case.rule, case.bias_E, pad)
        assert torch.equal(alone.ids_BTK, routing.ids_BTK[number])
        torch.testing.assert_close(alone.weights_BTK, routing.weights_BTK[number])
        if routing.over_budget_B is not None:
            assert alone.over_budget_B is not None
            assert alone.over_budget_B.shape == ()
            assert bool(alone.over_budget_B) == bool(routing.over_budget_B[number])


@given(cases(scope=True))
@PATIENT
def test_slots_come_best_first_and_skipped_last(case: Case) -> None:
    assume(case.rule.threshold is None)  # keeps slots by gate, which a bias does not rank by
    ids, ranks = routed(case).ids_BTK, ranking(case)
    used = ids < case.experts
    assert (used[..., 1:] <= used[..., :-1]).all()
    ranked = ranks.gather(-1, ids.clamp(max=case.experts - 1)).masked_fill(~used, float("-inf"))
    assert (ranked[..., 1:] <= ranked[..., :-1])[~padding(case)].all()


def test_oea_fills_from_far_down_a_tokens_own_ranking() -> None:
    """Two tokens: each one's best is active, though it is the other's last."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    routing = route(logits, Router(normalise=True), 2, Rule(guaranteed=1))
    assert routing.ids_BTK.tolist() == [[0, 3], [3, 0]]
    torch.testing.assert_close(routing.weights_BTK.sum(dim=-1), torch.ones(2))


def test_a_token_with_too_few_experts_active_skips_slots() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2)
    routing = route(logits, Router(normalise=True), 3, Rule(guaranteed=1))
    assert routing.ids_BTK.tolist() == [[0, 4, 4]] * 2
    assert routing.weights_BTK.tolist() == [[1.0, 0.0, 0.0]] * 2


def test_equal_rankings_go_to_the_lower_id() -> None:
    routing = route(torch.zeros(3, 16), Router(), 4, Rule(guaranteed=4))
    assert routing.ids_BTK.tolist() == [[0, 1, 2, 3]] * 3


def test_a_dropped_slot_in_the_middle_does_not_cost_a_guaranteed_one() -> None:
    """The bias ranks expert 1 second, its gate is below the threshold; token 1 activates it."""
    logits = torch.tensor([[3.0, -3.0, 2.0, -4.0], [-4.0, 3.0, -4.0, -4.0]])
    bias = torch.tensor([0.0, 0.9, 0.0, 0.0])
    router = Router("sigmoid", "bias", normalise=True)
    routing = route(logits, router, 3, Rule(threshold=0.5, guaranteed=2), bias)
    assert routing.ids_BTK[0, :2].tolist() == [0, 2]
    assert routing.ids_BTK[0, 2] == 4


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_guaranteeing_every_slot_is_the_model_itself(name: str) -> None:
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    full = route(logits, ROUTERS[name], 4, Rule())
    shared = route(logits, ROUTERS[name], 4, Rule(guaranteed=4))
    assert torch.equal(full.ids_BTK.sort(dim=-1)[0], shared.ids_BTK.sort(dim=-1)[0])
    torch.testing.assert_close(full.weights_BTK.sort(dim=-1)[0], shared.weights_BTK.sort(dim=-1)[0])


def test_top_k_0_skips_everything() -> None:
    routing = route(torch.randn(2, 3, 8), Router(), 4, Rule(top_k=0))
    assert routing.ids_BTK.tolist() == [[[8]] * 3] * 2
    assert routing.weights_BTK.eq(0).all()


def test_more_slots_than_groups_hold_are_skipped() -> None:
    routing = route(torch.randn(5, 16), ROUTERS["V2 groups"], 10, Rule())
    assert (routing.ids_BTK < 16).sum(dim=-1).tolist() == [8] * 5


def test_every_rule_runs_under_inference_mode_and_outside_it() -> None:
    rule = Rule(3, 0.5, 0.9, 2, 6, tuple(range(7)))
    logits = torch.randn(4, 8)
    with torch.inference_mode():
        inside = route(logits, Router(), 4, rule)
    outside = route(logits.requires_grad_(), Router(), 4, rule)
    assert torch.equal(inside.ids_BTK, outside.ids_BTK)
    outside.weights_BTK.sum().backward()


def test_skipped_slots_activate_nothing_and_count_for_nothing() -> None:
    ids = torch.tensor([[[0, 1], [1, 4]], [[4, 4], [4, 4]]])
    assert count_distinct(ids, 4).tolist() == [2, 0]
    assert count_slots(ids, 4).tolist() == [3, 0]
    assert int(count_distinct(ids[0], 4)) == 2
    assert int(count_slots(ids[0], 4)) == 3


def test_steps_are_counted_apart() -> None:
    ids = torch.randint(0, 9, (5, 7, 3), generator=torch.Generator().manual_seed(0))
    expected = [len(set(step.flatten().tolist()) - {8}) for step in ids]
    assert count_distinct(ids, 8).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_uniform_top_k_is_the_family_with_that_k_bit_for_bit(
    family: str, top_k: int, dtype: torch.dtype
) -> None:
    model = tiny.build(family, dtype)
    shape = shape_of(model)
    for module in model.modules():
        if getattr(module, "top_k", None) == shape.top_k:
            module.top_k = top_k
    for layer, logits_TE, ids_TK, weights_TK in routed_by_family(model, dtype):
        assert ids_TK.shape[-1] == top_k
        bias_E = layer.ranking_bias(shape.router)
        found = route(logits_TE, shape.router, shape.top_k, Rule(top_k), bias_E)
        assert torch.equal(found.ids_BTK, ids_TK)
        assert torch.equal(found.weights_BTK.to(weights_TK.dtype), weights_TK)

        padding_T = torch.arange(len(logits_TE)) % 3 == 0
        padded = route(logits_TE, shape.router, shape.top_k, Rule(top_k), bias_E, padding_T)
        assert torch.equal(padded.ids_BTK[~padding_T], ids_TK[~padding_T])
        assert torch.equal(padded.weights_BTK[~padding_T], found.weights_BTK[~padding_T])
