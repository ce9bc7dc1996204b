"""route_gpu beyond tests/conformance: blocks, ids for engines, experts on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import repeat_best, write_skipped
from leanmoe.kernels.rule_words import DeviceRules, TokenRules
from leanmoe.kernels.triton.route_call import MOST_TOKENS_OF_ALL
from leanmoe.kernels.triton.router import (
    MOST_EXPERTS,
    RoutedGpu,
    route_gpu,
    route_gpu_ids,
    route_gpu_unsupported,
)
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope, RuleTable, route, route_rows
from tests.conformance.cases import ROUTERS, Case, cases
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

FEW = settings(deadline=None, max_examples=12)
"""The interpreter takes a tenth of a second for a token."""
PLACEMENTS = (
    Placement.linear(32, 2),
    Placement.linear(32, 5),
    Placement.round_robin(32, 4),
    Placement((2, 0) * 16, 3),
)
"""The last has a rank without experts."""
RULES = [
    Rule(top_k=3),
    Rule(threshold=0.4),
    Rule(top_p=0.7),
    Rule(threshold=0.2, top_p=0.8, renormalise=0.0),
    Rule(guaranteed=1),
    Rule(guaranteed=2, threshold=0.3),
    Rule(budget=6),
    Rule(top_k=3, guaranteed=2, budget=5),
    Rule(experts=tuple(range(1, 24)), guaranteed=1, renormalise=0.0),
]


@pytest.mark.parametrize("rule", [Rule(threshold=0.5, guaranteed=g) for g in (1, 2)])
def test_what_a_threshold_keeps_comes_before_others_whatever_ranks_higher(rule: Rule) -> None:
    """With a bias a token's best by rank may fall to the threshold, and others keep it active."""
    generator = torch.Generator().manual_seed(0)
    router = Router("sigmoid", "bias", True, 1e-20, 2.5)
    logits_TE = torch.randn(40, 32, generator=generator)
    bias_E = torch.randn(32, generator=generator) * 3
    arguments = (logits_TE, router, 6, rule, bias_E, None)
    found, wanted = route_here(*arguments), route(*arguments)
    check_same(found, wanted, 32)
    by_rank = route(logits_TE, router, 6, Rule(guaranteed=rule.guaranteed), bias_E)
    assert (wanted.ids_BTK[:, :2].sort()[0] != by_rank.ids_BTK[:, :2].sort()[0]).any()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_blocks_are_those_of_the_ids(rule: Rule) -> None:
    """Each rule with another router: tests/conformance has every pair."""
    names = [name for name, router in ROUTERS.items() if not router.zero_experts]
    name = names[RULES.index(rule) % len(names)]
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
        (Router(normalise=True), MOST_EXPERTS),
        (Router(normalise=True), 1),
    ],
    ids=["8 groups of 20", "6 groups of 10", "most", "1"],
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


@pytest.mark.parametrize("rule", [Rule(), Rule(guaranteed=1), Rule(budget=3)], ids=str)
def test_one_call_leaves_nothing_to_the_next(rule: Rule) -> None:
    for seed in range(3):
        logits, _ = draw(6, 32, seed)
        found = route_here(logits, Router(), 4, rule, ids_dtype=torch.int32)
        assert found.ids_TK.dtype is torch.int32
        check_same(found._replace(ids_TK=found.ids_TK.long()), route(logits, Router(), 4, rule), 32)
        check_blocks(found, 32)


def repeated_ids(found: RoutedGpu, experts: int, padding_T: Tensor | None) -> Tensor:
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
    expected_ids = repeated_ids(wanted, case.experts, case.padding_BT)
    assert ids_TK.tolist() == expected_ids.tolist()
    assert weights_TK.tolist() == wanted.weights_TK.tolist()


@given(cases(hostile=False))
@FEW
def test_skipped_slots_repeat_experts_that_are_active(drawn: Case) -> None:
    case = one_step(drawn)
    assume(not case.router.zero_experts)  # refused: the reference's alone
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
        ((2, 1025), torch.float32, Router(), "1025 experts"),
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


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["2", "5", "4 in turn", "one is empty"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(budget_per_rank=1),
        Rule(budget_per_rank=4),
        Rule(budget_per_rank=3, budget=7),
        Rule(budget_per_rank=5, guaranteed=2, threshold=0.2),
        Rule(budget_per_rank=3, experts=tuple(range(2, 30)), renormalise=0.0),
        Rule(budget_per_rank=32),
    ],
    ids=str,
)
def test_budgets_per_rank_are_those_of_the_reference(rule: Rule, placement: Placement) -> None:
    for seed, (tokens, name) in enumerate(
        ((1, "softmax"), (9, "softmax, normalised"), (24, "sigmoid with a bias"))
    ):
        logits, bias = draw(tokens, 32, seed)
        bias_E = bias if ROUTERS[name].ranking_bias else None
        padding = torch.arange(tokens) % 5 == 4
        arguments = (logits, ROUTERS[name], 4, rule, bias_E, padding)
        found = route_here(*arguments, placement)
        check_same(found, route(*arguments, BatchScope(placement)), 32)
        check_blocks(found, 32)


@pytest.mark.parametrize("budget", [1, 2, 5, 8, 16])
def test_equal_votes_on_a_rank_go_to_the_lower_id(budget: int) -> None:
    logits = torch.zeros(8, 32)
    for token in range(8):
        logits[token, 3 * token], logits[token, 31 - token] = 4.0, 3.0
    rule, router = Rule(budget_per_rank=budget), ROUTERS["softmax after top-k"]
    for placement in PLACEMENTS:
        found = route_here(logits, router, 2, rule, None, None, placement)
        check_same(found, route(logits, router, 2, rule, scope=BatchScope(placement)), 32)


@pytest.mark.parametrize(
    "rule", [Rule(guaranteed=1), Rule(budget=7, guaranteed=3), Rule(budget_per_rank=4)], ids=str
)
@pytest.mark.parametrize("own", [0, 1, 6])
def test_tokens_of_other_ranks_count_as_in_one_step_with_them(own: int, rule: Rule) -> None:
    logits, _ = draw(12, 32)
    placement, router = PLACEMENTS[0], ROUTERS["softmax, normalised"]
    wanted = route(logits, router, 4, rule, scope=BatchScope(placement))
    demands: list[Tensor] = []

    def listen(demand_3E: Tensor) -> Tensor:
        demands.append(demand_3E)
        return demand_3E

    route(logits[own:], router, 4, rule, scope=BatchScope(placement, listen))

    def add(demand_3E: Tensor) -> Tensor:
        return demand_3E + demands[0].to(demand_3E.device)

    for _ in range(2):  # the second finds nothing that the first left
        found = route_here(logits[:own], router, 4, rule, None, None, placement, add)
        assert found.ids_TK.sort(dim=-1)[0].tolist() == wanted.ids_BTK[:own].sort(-1)[0].tolist()
        if own:
            assert bool(found.over_budget) == bool(wanted.over_budget_B)


@pytest.mark.parametrize(
    "rule",
    [Rule(guaranteed=1), Rule(budget=7, guaranteed=2), Rule(budget=5), Rule(budget_per_rank=4)],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_as_many_tokens_of_other_ranks_as_there_may_be(rule: Rule, seed: int) -> None:
    """Counts and votes of 2^18 tokens, as the kernel's own word could not hold them."""
    generator = torch.Generator().manual_seed(seed)
    logits, _ = draw(6, 32, seed)
    placement, router = PLACEMENTS[0], ROUTERS["softmax, normalised"]
    others, unit = MOST_TOKENS_OF_ALL - 6, 1 << 32
    demand_3E = torch.zeros(3, 32, dtype=torch.int64)
    demand_3E[0, seed] = others
    demand_3E[1, 2:12] = torch.randint(1, others, (10,), generator=generator)
    demand_3E[2, :16] = torch.randint(0, others * (unit + 1), (16,), generator=generator)
    demand_3E[2, 16:19] = others * (unit + 1)
    demand_3E[2, 19:22] = 1

    def add(own: Tensor) -> Tensor:
        return own + demand_3E.to(own.device)

    wanted = route(logits, router, 4, rule, scope=BatchScope(placement, add))
    for _ in range(2):
        found = route_here(logits, router, 4, rule, None, None, placement, add)
        check_same(found, wanted, 32)


@pytest.mark.parametrize("budget", [8, 11, 17])
def test_votes_that_differ_in_their_last_bits_where_experts_are_most(budget: int) -> None:
    """What is searched among experts equal in their first 30 bits has 31: a vote's 21, an id's 10.

    Every search that begins one bit lower takes the lower ids instead.
    """
    experts, voted = MOST_EXPERTS, 20
    logits, _ = draw(6, experts)
    router = ROUTERS["softmax, normalised"]
    demand_3E = torch.zeros(3, experts, dtype=torch.int64)
    last_X = torch.arange(voted) * 7919 % 1013  # falls and rises with the id
    demand_3E[2, 40 : 40 + voted] = (1 << 49) + (1 << 20) + last_X
    demand_3E[1, 40 : 40 + voted] = 1

    def add(own: Tensor) -> Tensor:
        return own + demand_3E.to(own.device)

    scope = BatchScope(Placement.linear(experts, 2), add)
    rule = Rule(budget=budget)
    wanted = route(logits, router, 16, rule, scope=scope)
    found = route_here(logits, router, 16, rule, None, None, scope.placement, scope.exchange)
    check_same(found, wanted, experts)


@pytest.mark.parametrize(
    "rule", [Rule(guaranteed=1), Rule(budget=7, guaranteed=2), Rule(budget_per_rank=4)], ids=str
)
def test_skipped_slots_of_any_id_where_ranks_share_experts(rule: Rule) -> None:
    logits, _ = draw(9, 32)
    padding = torch.arange(9) % 5 == 4
    placement, router = PLACEMENTS[0], ROUTERS["softmax, normalised"]
    demand_3E = torch.ones(3, 32, dtype=torch.int64)

    def add(own: Tensor) -> Tensor:
        return own + demand_3E.to(own.device) * (torch.arange(32, device=own.device) < 5)

    arguments = (logits, router, 4, rule, None, padding, placement, add)
    wanted = route_here(*arguments)
    for skipped in (-1, 32):
        found = route_gpu_ids(*there(arguments), skipped_id=skipped)
        ids_TK, weights_TK = (tensor.cpu() for tensor in found)
        assert ids_TK.tolist() == wanted.ids_TK.masked_fill(wanted.ids_TK == 32, skipped).tolist()
        assert weights_TK.tolist() == wanted.weights_TK.tolist()


def test_a_placement_of_another_number_of_experts() -> None:
    rule, placement = Rule(budget_per_rank=2), Placement.linear(6, 2)
    with pytest.raises(LeanMoeError, match="placement is of 6 experts: the model has 8"):
        route_here(torch.randn(2, 8), Router(), 4, rule, None, None, placement)


LEVELS = [(Rule(guaranteed=2, threshold=0.3, budget=9), Rule(top_k=0))]


def test_slots_that_repeat_in_a_table_activate_nothing_more() -> None:
    logits, _ = draw(6, 32)
    table, router = RuleTable.of(4, LEVELS), Router(normalise=True)
    padding = torch.tensor([False] * 5 + [True])
    for rows in ([0, 1, 2, 1, 0, 0], [2, 1, 0, 1, 2, 0]):
        rules = DeviceRules([table], router, 4, 32, DEVICE)
        tokens = TokenRules(rules, torch.tensor(rows, device=DEVICE))
        wanted = route_here(logits, router, 4, tokens, None, padding)
        ids, weights = repeating_here(logits, router, 4, tokens, None, padding)
        assert ids.tolist() == repeat_best(wanted.ids_TK, 32, padding).tolist()
        assert weights.tolist() == wanted.weights_TK.tolist()


def test_tokens_of_other_ranks_count_under_a_table_too() -> None:
    logits, _ = draw(12, 32)
    placement, router = PLACEMENTS[0], ROUTERS["softmax, normalised"]
    table = RuleTable.of(
        4, [(Rule(budget_per_rank=3, guaranteed=2), Rule(top_k=1)), (Rule(), None)]
    )
    rows_T = torch.arange(12) % 5
    wanted = route_rows(logits, router, 4, table, rows_T, scope=BatchScope(placement))
    demands: list[Tensor] = []

    def listen(demand_3E: Tensor) -> Tensor:
        demands.append(demand_3E.clone())
        return demand_3E

    def call(half: slice, exchange: Any) -> RoutedGpu:
        rules = DeviceRules([table], router, 4, 32, DEVICE, ranks=2)
        tokens = TokenRules(rules, rows_T[half].to(DEVICE))
        return route_here(logits[half], router, 4, tokens, None, None, placement, exchange)

    halves = (slice(0, 5), slice(5, 12))
    for half in halves:
        call(half, listen)
    for half in halves:
        found = call(half, lambda _: demands[0] + demands[1])
        assert found.ids_TK.tolist() == wanted.ids_BTK[half].tolist()
