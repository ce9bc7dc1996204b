"""route_gpu: the programs against `route` and the work list against its reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from leanmoe.errors import LeanMoeError
from leanmoe.kernels.gpu.route import (
    MOST_TOKENS_OF_ALL,
    RoutedGpu,
    route_gpu,
    route_gpu_ids,
    why_not_route_gpu,
)
from leanmoe.kernels.gpu.work_list import work_list_reference
from leanmoe.placement import Placement
from leanmoe.plan import Rule
from leanmoe.routers import Router
from leanmoe.routing import Company, Routing, route
from tests.kernels.test_route_cpu import by_expert, is_clear
from tests.routing.cases import ROUTERS, Case, cases

FEW = settings(deadline=None, max_examples=25)
"""The interpreter takes a tenth of a second for a token."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def _there(values: Any) -> Any:
    return [v.to(DEVICE) if isinstance(v, Tensor) else v for v in values]


def route_here(*arguments: Any, **options: Any) -> RoutedGpu:
    """`route_gpu` on the GPU where there is one, what it finds back on the CPU."""
    found = route_gpu(*_there(arguments), **options)
    work = found.work._replace(
        **{name: getattr(found.work, name).cpu() for name in ("rows", "blocks_3B", "used_1")}
    )
    over = None if found.over_budget is None else found.over_budget.cpu()
    return RoutedGpu(found.ids_TK.cpu(), found.weights_TK.cpu(), over, work)


def repeating_here(*arguments: Any) -> tuple[Tensor, Tensor]:
    ids_TK, weights_TK = route_gpu_ids(*_there(arguments))
    return ids_TK.cpu(), weights_TK.cpu()


def one_step(case: Case) -> Case:
    """The first of a case's steps."""
    padding = None if case.padding_ST is None else case.padding_ST[0]
    return replace(case, logits_STE=case.logits_STE[0], padding_ST=padding)


def run(case: Case, block_rows: int = 16) -> RoutedGpu:
    arguments = (case.logits_STE, case.router, case.top_k, case.rule, case.bias_E, case.padding_ST)
    return route_here(*arguments, block_rows=block_rows)


def expected(case: Case) -> Routing:
    return route(case.logits_STE, case.router, case.top_k, case.rule, case.bias_E, case.padding_ST)


def slots_by_expert(found: RoutedGpu, experts: int) -> list[set[int]]:
    """Which slots the work list has for each expert; fails where one is listed twice."""
    rows, blocks, used, block_rows = found.work
    slots: list[list[int]] = [[] for _ in range(experts)]
    for expert, first, count in blocks[:, : int(used)].T.tolist():
        assert 0 < count <= block_rows
        slots[expert] += rows[first : first + count].tolist()
    assert all(len(set(listed)) == len(listed) for listed in slots)
    return [set(listed) for listed in slots]


def check_work(found: RoutedGpu, experts: int) -> None:
    flat = found.ids_TK.flatten().tolist()
    wanted: list[set[int]] = [set() for _ in range(experts)]
    for slot, expert in enumerate(flat):
        if expert < experts:
            wanted[expert].add(slot)
    assert slots_by_expert(found, experts) == wanted
    reference = work_list_reference(found.ids_TK, experts, found.work.block_rows)
    assert int(found.work.used_1) == int(reference.used_1)


def check_same(found: RoutedGpu, wanted: Routing, experts: int) -> None:
    routing = Routing(found.ids_TK, found.weights_TK, found.over_budget)
    assert found.ids_TK.sort(dim=-1)[0].tolist() == wanted.ids_STK.sort(dim=-1)[0].tolist()
    torch.testing.assert_close(
        by_expert(routing, experts), by_expert(wanted, experts), atol=1e-5, rtol=1e-4
    )
    assert (found.over_budget is None) == (wanted.over_budget_S is None)
    if found.over_budget is not None and wanted.over_budget_S is not None:
        assert bool(found.over_budget) == bool(wanted.over_budget_S)


@given(cases(hostile=False))
@FEW
def test_the_same_experts_and_weights_as_the_reference(drawn: Case) -> None:
    case = one_step(drawn)
    assume(is_clear(case))
    found = run(case)
    check_same(found, expected(case), case.experts)
    check_work(found, case.experts)


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
    assert (wanted.ids_STK[:, :2].sort()[0] != by_rank.ids_STK[:, :2].sort()[0]).any()


@given(cases())
@FEW
def test_hostile_scores_keep_every_promise(drawn: Case) -> None:
    case = one_step(drawn)
    found = run(case, block_rows=2)
    used = found.ids_TK < case.experts
    assert bool((found.weights_TK[~used] == 0).all())
    assert bool(found.weights_TK.isfinite().all())
    for token in found.ids_TK.tolist():
        awake = [expert for expert in token if expert < case.experts]
        assert len(set(awake)) == len(awake)
        assert token == awake + [case.experts] * (len(token) - len(awake))
        assert case.rule.experts is None or set(awake) <= set(case.rule.experts)
    if case.padding_ST is not None:
        assert not bool(used[case.padding_ST].any())
    if case.rule.budget is not None:
        distinct = len(set(found.ids_TK[used].tolist()))
        assert bool(found.over_budget) or distinct <= case.rule.budget
    check_work(found, case.experts)


@given(cases())
@FEW
def test_logits_that_rank_as_they_are_give_the_reference_bit_for_bit(drawn: Case) -> None:
    guaranteed = drawn.rule.guaranteed or 1  # then the reference breaks ties by the lower id too
    rule = Rule(drawn.rule.top_k, guaranteed=guaranteed, experts=drawn.rule.experts)
    case = one_step(replace(drawn, name="softmax after top-k", bias_E=None, rule=rule))
    assert run(case).ids_TK.tolist() == expected(case).ids_STK.tolist()


def draw(tokens: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    return logits, torch.randn(experts, generator=generator) * 0.1


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
    check_work(found, 32)


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
    check_work(found, experts)


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
        check_work(found, 32)


def spelled_by_repeating(found: RoutedGpu, experts: int, padding_T: Tensor | None) -> Tensor:
    """The ids of `route_gpu`, each skipped slot the token's best, or the first token's."""
    best_T1 = found.ids_TK[:, :1]
    fallback = torch.where(best_T1 < experts, best_T1, 0)
    if padding_T is not None:
        fallback = torch.where(padding_T[:, None], fallback[:1], fallback)
    return torch.where(found.ids_TK < experts, found.ids_TK, fallback)


def check_repeating(case: Case) -> None:
    arguments = (case.logits_STE, case.router, case.top_k, case.rule, case.bias_E, case.padding_ST)
    ids_TK, weights_TK = repeating_here(*arguments)
    wanted = run(case)
    assert ids_TK.dtype is torch.int32
    expected_ids = spelled_by_repeating(wanted, case.experts, case.padding_ST)
    assert ids_TK.tolist() == expected_ids.tolist()
    assert weights_TK.tolist() == wanted.weights_TK.tolist()


@given(cases(hostile=False))
@FEW
def test_repeating_spells_skipped_slots_by_experts_that_are_awake(drawn: Case) -> None:
    case = one_step(drawn)
    if case.padding_ST is not None:  # else the first token has no routing of its own
        assume(not bool(case.padding_ST[:1].any()))
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


PLACEMENTS = (
    Placement.linear(32, 2),
    Placement.linear(32, 5),
    Placement.round_robin(32, 4),
    Placement((2, 0) * 16, 3),
)
"""The last has a rank without experts."""


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["2", "5", "4 in turn", "one is empty"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(budget_per_rank=1),
        Rule(budget_per_rank=4),
        Rule(budget_per_rank=3, budget=7),
        Rule(budget_per_rank=5, guaranteed=2, threshold=0.2),
        Rule(budget_per_rank=3, experts=tuple(range(2, 30)), keep_weights=True),
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
        check_same(found, route(*arguments, Company(placement)), 32)
        check_work(found, 32)


@pytest.mark.parametrize("budget", [1, 2, 5, 8, 16])
def test_equal_votes_on_a_rank_go_to_the_lower_id(budget: int) -> None:
    logits = torch.zeros(8, 32)
    for token in range(8):
        logits[token, 3 * token], logits[token, 31 - token] = 4.0, 3.0
    rule, router = Rule(budget_per_rank=budget), ROUTERS["softmax after top-k"]
    for placement in PLACEMENTS:
        found = route_here(logits, router, 2, rule, None, None, placement)
        check_same(found, route(logits, router, 2, rule, company=Company(placement)), 32)


@pytest.mark.parametrize(
    "rule", [Rule(guaranteed=1), Rule(budget=7, guaranteed=3), Rule(budget_per_rank=4)], ids=str
)
@pytest.mark.parametrize("own", [0, 1, 6])
def test_tokens_of_other_ranks_count_as_in_one_step_with_them(own: int, rule: Rule) -> None:
    logits, _ = draw(12, 32)
    placement, router = PLACEMENTS[0], ROUTERS["softmax, normalised"]
    wanted = route(logits, router, 4, rule, company=Company(placement))
    ballots: list[Tensor] = []

    def listen(ballot_3E: Tensor) -> Tensor:
        ballots.append(ballot_3E)
        return ballot_3E

    route(logits[own:], router, 4, rule, company=Company(placement, listen))

    def add(ballot_3E: Tensor) -> Tensor:
        return ballot_3E + ballots[0].to(ballot_3E.device)

    for _ in range(2):  # the second finds nothing that the first left
        found = route_here(logits[:own], router, 4, rule, None, None, placement, add)
        assert found.ids_TK.sort(dim=-1)[0].tolist() == wanted.ids_STK[:own].sort(-1)[0].tolist()
        if own:
            assert bool(found.over_budget) == bool(wanted.over_budget_S)


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
    ballot_3E = torch.zeros(3, 32, dtype=torch.int64)
    ballot_3E[0, seed] = others
    ballot_3E[1, 2:12] = torch.randint(1, others, (10,), generator=generator)
    ballot_3E[2, :16] = torch.randint(0, others * (unit + 1), (16,), generator=generator)
    ballot_3E[2, 16:19] = others * (unit + 1)
    ballot_3E[2, 19:22] = 1

    def add(own: Tensor) -> Tensor:
        return own + ballot_3E.to(own.device)

    wanted = route(logits, router, 4, rule, company=Company(placement, add))
    for _ in range(2):
        found = route_here(logits, router, 4, rule, None, None, placement, add)
        check_same(found, wanted, 32)


@pytest.mark.parametrize(
    "rule", [Rule(guaranteed=1), Rule(budget=7, guaranteed=2), Rule(budget_per_rank=4)], ids=str
)
def test_skipped_slots_of_any_id_where_ranks_share_experts(rule: Rule) -> None:
    logits, _ = draw(9, 32)
    padding = torch.arange(9) % 5 == 4
    placement, router = PLACEMENTS[0], ROUTERS["softmax, normalised"]
    ballot_3E = torch.ones(3, 32, dtype=torch.int64)

    def add(own: Tensor) -> Tensor:
        return own + ballot_3E.to(own.device) * (torch.arange(32, device=own.device) < 5)

    arguments = (logits, router, 4, rule, None, padding, placement, add)
    wanted = route_here(*arguments)
    for skipped in (-1, 32):
        found = route_gpu_ids(*_there(arguments), skipped_id=skipped)
        ids_TK, weights_TK = (tensor.cpu() for tensor in found)
        assert ids_TK.tolist() == wanted.ids_TK.masked_fill(wanted.ids_TK == 32, skipped).tolist()
        assert weights_TK.tolist() == wanted.weights_TK.tolist()


def test_no_tokens() -> None:
    found = route_here(torch.randn(0, 32), Router(), 4, Rule(budget=3))
    assert found.ids_TK.shape == (0, 4)
    assert int(found.work.used_1) == 0
    assert not bool(found.over_budget)


def test_says_what_it_cannot_do() -> None:
    after = ROUTERS["softmax after top-k"]
    for shape, dtype, router, reason in (
        ((2, 8), torch.bfloat16, after, "bfloat16"),
        ((2, 513), torch.float32, Router(), "513 experts"),
        ((1, 2, 8), torch.float32, Router(), "dimensions"),
    ):
        logits = torch.randn(shape, dtype=dtype, device=DEVICE)
        assert reason in str(why_not_route_gpu(logits, router, Rule()))
    rule, placement = Rule(budget_per_rank=2), Placement.linear(6, 2)
    with pytest.raises(LeanMoeError, match="placement is of 6 experts: the model has 8"):
        route_here(torch.randn(2, 8), Router(), 4, rule, None, None, placement)
    with pytest.raises(LeanMoeError, match="nothing is routed"):
        route_here(torch.randn(2, 8), after, 4, Rule(top_k=0))
