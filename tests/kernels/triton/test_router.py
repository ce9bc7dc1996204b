"""route_gpu: the programs against `route` and the blocks against its reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import repeat_best, write_skipped
from leanmoe.kernels.triton.router import (
    RoutedGpu,
    route_gpu,
    route_gpu_ids,
    route_gpu_unsupported,
)
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import route
from tests.conformance.cases import ROUTERS, Case, cases
from tests.conformance.test_implementations import is_clear
from tests.kernels.triton.routed import (
    DEVICE,
    check_blocks,
    check_same,
    draw,
    expected,
    one_step,
    repeating_here,
    route_here,
    run,
    there,
)

FEW = settings(deadline=None, max_examples=25)
"""The interpreter takes a tenth of a second for a token."""
RULES = [
    Rule(top_k=3),
    Rule(threshold=0.4),
    Rule(top_p=0.7),
    Rule(threshold=0.2, top_p=0.8, keep_weights=True),
    Rule(guaranteed=1),
    Rule(guaranteed=2, threshold=0.3),
    Rule(budget=6),
    Rule(top_k=3, guaranteed=2, budget=5),
    Rule(experts=tuple(range(1, 24)), guaranteed=1, keep_weights=True),
]


@given(cases(hostile=False))
@FEW
def test_the_same_experts_and_weights_as_the_reference(drawn: Case) -> None:
    case = one_step(drawn)
    assume(is_clear(case))
    found = run(case)
    check_same(found, expected(case), case.experts)
    check_blocks(found, case.experts)


@pytest.mark.parametrize("rule", [Rule(threshold=0.5, guaranteed=g) for g in (1, 2)])
def test_what_a_threshold_keeps_comes_before_others_whatever_ranks_higher(rule: Rule) -> None:
    """With a bias a token's best by rank may fall to the threshold, and others keep it awake."""
    generator = torch.Generator().manual_seed(0)
    router = Router("sigmoid", "bias", True, 1e-20, 2.5)
    logits_TE = torch.randn(40, 32, generator=generator)
    bias_E = torch.randn(32, generator=generator) * 3
    arguments = (logits_TE, router, 6, rule, bias_E, None)
    found, wanted = route_here(*arguments), route(*arguments)
    check_same(found, wanted, 32)
    by_rank = route(logits_TE, router, 6, Rule(guaranteed=rule.guaranteed), bias_E)
    assert (wanted.ids_BTK[:, :2].sort()[0] != by_rank.ids_BTK[:, :2].sort()[0]).any()


@given(cases())
@FEW
def test_hostile_scores_keep_every_promise(drawn: Case) -> None:
    case = one_step(drawn)
    found = run(case, block_rows=2)
    used = found.ids_TK < case.experts
    assert bool((found.weights_TK[~used] == 0).all())
    assert bool(found.weights_TK.isfinite().all())
    for token in found.ids_TK.tolist():
        active = [expert for expert in token if expert < case.experts]
        assert len(set(active)) == len(active)
        assert token == active + [case.experts] * (len(token) - len(active))
        assert case.rule.experts is None or set(active) <= set(case.rule.experts)
    if case.padding_BT is not None:
        assert not bool(used[case.padding_BT].any())
    if case.rule.budget is not None:
        distinct = len(set(found.ids_TK[used].tolist()))
        assert bool(found.over_budget) or distinct <= case.rule.budget
    check_blocks(found, case.experts)


@given(cases())
@FEW
def test_logits_that_rank_as_they_are_give_the_reference_bit_for_bit(drawn: Case) -> None:
    guaranteed = drawn.rule.guaranteed or 1  # then the reference breaks ties by the lower id too
    rule = Rule(drawn.rule.top_k, guaranteed=guaranteed, experts=drawn.rule.experts)
    case = one_step(replace(drawn, name="softmax after top-k", bias_E=None, rule=rule))
    assert run(case).ids_TK.tolist() == expected(case).ids_BTK.tolist()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_rule_with_every_router(name: str, rule: Rule) -> None:
    logits, bias = draw(9, 32)
    case = Case(
        name, logits, bias if ROUTERS[name].ranking_bias else None,
        torch.tensor([False, True, *[False] * 7]), 4, rule,
    )  # fmt: skip
    found = run(case, block_rows=4)
    check_same(found, expected(case), 32)
    check_blocks(found, 32)


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        (Router("sigmoid", "bias", True, 1e-20, 2.5, 8, 4, "top2_sum", False), 160),
        (Router(groups=6, groups_used=2, group_score="max"), 60),
        (Router(normalise=True), 512),
        (Router(normalise=True), 1),
    ],
    ids=["8 groups of 20", "6 groups of 10", "512", "1"],
)
@pytest.mark.parametrize("rule", [Rule(), Rule(guaranteed=1), Rule(budget=1)], ids=str)
def test_any_number_of_experts(router: Router, experts: int, rule: Rule) -> None:
    logits, bias = draw(5, experts)
    bias_E = bias if router.ranking_bias else None
    top_k = min(6, experts)
    found = route_here(logits, router, top_k, rule, bias_E)
    check_same(found, route(logits, router, top_k, rule, bias_E), experts)
    check_blocks(found, experts)


@pytest.mark.parametrize("budget", [1, 8, 9, 13, 15, 16, 32])
def test_equal_votes_go_to_the_lower_id(budget: int) -> None:
    logits = torch.zeros(8, 32)
    for token in range(8):
        logits[token, 3 * token], logits[token, 31 - token] = 4.0, 3.0
    rule, router = Rule(budget=budget), ROUTERS["softmax after top-k"]
    found = route_here(logits, router, 2, rule)
    check_same(found, route(logits, router, 2, rule), 32)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("rule", [Rule(top_k=2), Rule(guaranteed=2), Rule(budget=5)], ids=str)
def test_nan_in_a_token_is_nan_in_its_weights_and_in_no_other(name: str, rule: Rule) -> None:
    logits, bias = draw(4, 32)
    logits[1, 7] = float("nan")
    bias_E = bias if ROUTERS[name].ranking_bias else None
    weights = route_here(logits, ROUTERS[name], 4, rule, bias_E).weights_TK
    assert weights.isnan().any(dim=-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("rule", [Rule(), Rule(guaranteed=1), Rule(budget=3)], ids=str)
def test_one_call_leaves_nothing_to_the_next(rule: Rule) -> None:
    for seed in range(3):
        logits, _ = draw(6, 32, seed)
        found = route_here(logits, Router(), 4, rule, ids_dtype=torch.int32)
        assert found.ids_TK.dtype is torch.int32
        check_same(found._replace(ids_TK=found.ids_TK.long()), route(logits, Router(), 4, rule), 32)
        check_blocks(found, 32)


def spelled_by_repeating(found: RoutedGpu, experts: int, padding_T: Tensor | None) -> Tensor:
    """The ids of `route_gpu`, each skipped slot the token's best, or the first token's."""
    best_T1 = found.ids_TK[:, :1]
    fallback = torch.where(best_T1 < experts, best_T1, 0)
    if padding_T is not None:
        fallback = torch.where(padding_T[:, None], fallback[:1], fallback)
    return torch.where(found.ids_TK < experts, found.ids_TK, fallback)


def check_repeating(case: Case) -> None:
    arguments = (case.logits_BTE, case.router, case.top_k, case.rule, case.bias_E, case.padding_BT)
    ids_TK, weights_TK = repeating_here(*arguments)
    wanted = run(case)
    assert ids_TK.dtype is torch.int32
    expected_ids = spelled_by_repeating(wanted, case.experts, case.padding_BT)
    assert ids_TK.tolist() == expected_ids.tolist()
    assert weights_TK.tolist() == wanted.weights_TK.tolist()


@given(cases(hostile=False))
@FEW
def test_repeating_spells_skipped_slots_by_experts_that_are_active(drawn: Case) -> None:
    case = one_step(drawn)
    if case.padding_BT is not None:  # else the first token has no routing of its own
        assume(not bool(case.padding_BT[:1].any()))
    check_repeating(case)


@pytest.mark.parametrize("rule", [*RULES, Rule()], ids=str)
@pytest.mark.parametrize("name", ["softmax, normalised", "V3 groups"])
def test_repeating_of_bfloat16_logits_call_after_call(name: str, rule: Rule) -> None:
    logits, bias = draw(7, 32)
    padding = torch.tensor([False] * 5 + [True] * 2)
    bias_E = bias if ROUTERS[name].ranking_bias else None
    case = Case(name, logits.bfloat16(), bias_E, padding, 4, rule)
    for _ in range(2):  # the second call finds the counters as it wants them
        check_repeating(case)


def test_repeating_of_padding_alone_names_experts_that_exist() -> None:
    logits, _ = draw(4, 32)
    padding = torch.ones(4, dtype=torch.bool)
    for rule in (Rule(top_k=2), Rule(guaranteed=1), Rule(budget=3)):
        ids, weights = repeating_here(logits, Router(), 4, rule, None, padding)
        assert ids.tolist() == [[int(logits[0].argmax())] * ids.shape[1]] * 4
        assert not bool(weights.any())


def test_no_tokens() -> None:
    found = route_here(torch.randn(0, 32), Router(), 4, Rule(budget=3))
    assert found.ids_TK.shape == (0, 4)
    assert int(found.blocks.used_1) == 0
    assert not bool(found.over_budget)


def test_says_what_it_cannot_do() -> None:
    after = ROUTERS["softmax after top-k"]
    for shape, dtype, router, reason in (
        ((2, 8), torch.bfloat16, after, "bfloat16"),
        ((2, 513), torch.float32, Router(), "513 experts"),
        ((1, 2, 8), torch.float32, Router(), "dimensions"),
    ):
        logits = torch.randn(shape, dtype=dtype, device=DEVICE)
        assert reason in str(route_gpu_unsupported(logits, router, Rule()))
    with pytest.raises(LeanMoeError, match="nothing is routed"):
        route_here(torch.randn(2, 8), after, 4, Rule(top_k=0))


def test_ids_for_engines_repeat_the_best_as_in_torch() -> None:
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([False] * 4 + [True] * 2)
    rule, router = Rule(guaranteed=1, threshold=0.5), Router(normalise=True)
    logits, padding = there((logits, padding))
    plain = route_gpu(logits, router, 4, rule, None, padding)
    ids, weights = route_gpu_ids(logits, router, 4, rule, None, padding)
    assert ids.tolist() == repeat_best(plain.ids_TK, 32, padding).tolist()
    assert weights.tolist() == plain.weights_TK.tolist()


@given(cases(hostile=False))
@FEW
def test_ids_for_engines_pass_over_the_same_slots(drawn: Case) -> None:
    case = one_step(drawn)
    logits, bias, padding = there((case.logits_BTE, case.bias_E, case.padding_BT))
    assume(route_gpu_unsupported(logits, case.router, case.rule) is None)
    arguments = (logits, case.router, case.top_k, case.rule, bias, padding)
    plain = route_gpu(*arguments)
    for number in (-1, case.experts):
        ids, weights = route_gpu_ids(*arguments, skipped_id=number)
        wanted = write_skipped(plain.ids_TK, case.experts, padding, number)
        assert ids.dtype is torch.int32
        assert ids.tolist() == wanted.tolist()
        torch.testing.assert_close(weights, plain.weights_TK, rtol=0, atol=0, equal_nan=True)
