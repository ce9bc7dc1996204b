"""route_rows(): what must hold for any table, and for any mix of its rows in a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import (
    BatchScope,
    Routing,
    RowRule,
    RuleTable,
    count_distinct,
    route,
    route_rows,
)
from tests.conformance.cases import ROUTERS, TableCase, table_cases

PATIENT = settings(deadline=None)  # a call's time says nothing on a busy machine


def routed(drawn: TableCase, padding_BT: Tensor | None = None) -> Routing:
    case = drawn.case
    padding_BT = case.padding_BT if padding_BT is None else padding_BT
    return route_rows(
        case.logits_BTE, case.router, case.top_k, drawn.table, drawn.rule_rows_BT,
        case.bias_E, padding_BT,
    )  # fmt: skip


def alone(drawn: TableCase, rule: Rule) -> Routing:
    """Every token under one rule, as wide as the table's widest row."""
    case = drawn.case
    found = route(
        case.logits_BTE, case.router, case.top_k, rule, case.bias_E, case.padding_BT
    )  # fmt: skip
    more = (0, max(drawn.table.slots, 1) - found.ids_BTK.shape[-1])
    ids_BTK = torch.nn.functional.pad(found.ids_BTK, more, value=case.experts)
    return Routing(ids_BTK, torch.nn.functional.pad(found.weights_BTK, more), found.over_budget_B)


def check_equal(found: Routing, wanted: Routing, where_BT: Tensor) -> None:
    """Bit for bit, on these tokens."""
    assert found.weights_BTK.dtype is wanted.weights_BTK.dtype
    assert torch.equal(found.ids_BTK[where_BT], wanted.ids_BTK[where_BT])
    assert torch.equal(found.weights_BTK[where_BT], wanted.weights_BTK[where_BT])


@given(table_cases(), st.data())
@PATIENT
def test_a_step_of_one_row_is_routed_under_its_rule(drawn: TableCase, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(drawn.table.rows) - 1))
    rule, limits = drawn.table.rows[number].rule, drawn.table.step_rule
    if rule.has_budget:
        rule = replace(rule, budget=limits.budget, budget_per_rank=limits.budget_per_rank)
        assume(rule.has_budget)  # else every vote counts, which is no rule
    one = replace(drawn, rule_rows_BT=torch.full_like(drawn.rule_rows_BT, number))
    check_equal(routed(one), alone(drawn, rule), torch.ones_like(drawn.rule_rows_BT).bool())


@given(table_cases())
@PATIENT
def test_tokens_whose_rule_is_theirs_alone_are_as_alone_in_any_mix(drawn: TableCase) -> None:
    """Those of row 0, which is the model as trained, among them."""
    found = routed(drawn)
    for number, row in enumerate(drawn.table.rows):
        if not row.rule.is_batch_aware:
            check_equal(found, alone(drawn, row.rule), drawn.rule_rows_BT == number)


@given(table_cases(), st.integers(-3, 300))
@PATIENT
def test_a_number_that_is_no_row_is_the_model_as_trained(drawn: TableCase, number: int) -> None:
    assume(not 0 <= number < len(drawn.table.rows))
    one = replace(drawn, rule_rows_BT=torch.full_like(drawn.rule_rows_BT, number).short())
    check_equal(routed(one), alone(drawn, Rule()), torch.ones_like(drawn.rule_rows_BT).bool())


@given(table_cases(scope=True))
@PATIENT
def test_prompt_rows_and_padding_change_nothing_for_others(drawn: TableCase) -> None:
    """A step without them gives the same: they mark nothing and have no vote."""
    roles = torch.tensor([row.marks > 0 for row in drawn.table.rows])
    is_reply_BT = roles[drawn.rule_rows_BT]
    found = routed(drawn)
    padding_BT = drawn.case.padding_BT
    is_real_BT = torch.ones_like(is_reply_BT) if padding_BT is None else ~padding_BT
    assert (found.ids_BTK[~is_real_BT] == drawn.case.experts).all()
    assert (found.weights_BTK[~is_real_BT] == 0).all()
    without = routed(drawn, padding_BT=~(is_real_BT & is_reply_BT))
    check_equal(found, without, is_reply_BT & is_real_BT)
    if found.over_budget_B is not None:
        assert without.over_budget_B is not None
        assert torch.equal(found.over_budget_B, without.over_budget_B)


@given(table_cases(scope=True))
@PATIENT
def test_company_is_never_poorer_than_the_rows_own(drawn: TableCase) -> None:
    """Beside others, the tokens of a row use at least as many slots as their like alone would.

    Without a budget that holds token by token; with one, where experts give way to others, for how
    many experts are active.
    """
    assume(drawn.case.router.zero_experts == 0)
    found, experts = routed(drawn), drawn.case.experts
    padding_BT = drawn.case.padding_BT
    for number in range(len(drawn.table.rows)):
        is_other_BT = drawn.rule_rows_BT != number
        hidden_BT = is_other_BT if padding_BT is None else is_other_BT | padding_BT
        own = routed(drawn, padding_BT=hidden_BT)
        if drawn.table.step_rule.has_budget:
            assert (
                count_distinct(found.ids_BTK, experts) >= count_distinct(own.ids_BTK, experts)
            ).all()
        else:
            used, wanted = ((r.ids_BTK < experts).sum(dim=-1) for r in (found, own))
            assert (used >= wanted).all()


@given(table_cases(scope=True))
@PATIENT
def test_the_budget_counts_what_reply_rows_must_have(drawn: TableCase) -> None:
    budget = drawn.table.step_rule.budget
    assume(budget is not None and not drawn.case.router.zero_experts)
    assert budget is not None
    found, experts = routed(drawn), drawn.case.experts
    is_prompt = torch.tensor([row.marks == 0 for row in drawn.table.rows])[drawn.rule_rows_BT]
    ids_BTK = found.ids_BTK.masked_fill(is_prompt.unsqueeze(-1), experts)
    musts = torch.tensor([row.must for row in drawn.table.rows])[drawn.rule_rows_BT]
    place_K = torch.arange(ids_BTK.shape[-1])
    musts_BTK = ids_BTK.masked_fill(place_K >= musts.unsqueeze(-1), experts)
    bests_B = count_distinct(musts_BTK, experts)
    assert (count_distinct(ids_BTK, experts) <= bests_B.clamp(min=budget)).all()
    assert found.over_budget_B is not None
    assert torch.equal(found.over_budget_B, bests_B > budget)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_nan_in_a_token_stays_there(name: str) -> None:
    router = ROUTERS[name]
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(6, 32, generator=generator)
    bias_E = torch.randn(32, generator=generator) if router.ranking_bias else None
    table = RuleTable.of(4, [(Rule(top_k=2), Rule(top_k=1)), (Rule(guaranteed=1), None)])
    rows_T = torch.tensor([0, 1, 2, 3, 1, 0])
    logits_TE[1, 7] = float("nan")
    weights_TK = route_rows(logits_TE, router, 4, table, rows_T, bias_E).weights_BTK
    assert weights_TK.isnan().any(dim=-1).tolist() == [False, True, False, False, False, False]


def test_equal_rankings_go_to_the_lower_id_in_every_row_that_shares() -> None:
    table = RuleTable.of(4, [(Rule(guaranteed=2), None), (Rule(guaranteed=4), None)])
    found = route_rows(torch.zeros(2, 16), Router(), 4, table, torch.tensor([1, 3]))
    assert found.ids_BTK.tolist() == [[0, 1, 2, 3]] * 2


def test_a_row_fills_from_what_the_full_tier_activates() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    table = RuleTable.of(2, [(Rule(guaranteed=1), None)])
    found = route_rows(logits, Router(normalise=True), 2, table, torch.tensor([1, 0]))
    assert found.ids_BTK.tolist() == [[0, 2], [3, 2]]


def test_own_slots_stay_though_nobody_has_marked_them() -> None:
    """As a draft's row may be: it keeps its best and offers nothing."""
    quiet = RowRule(Rule(guaranteed=1), slots=2, own=1, marks=0, must=0)
    table = RuleTable((RowRule.trained(2), quiet))
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    found = route_rows(logits, Router(normalise=True), 2, table, torch.tensor([1, 0]))
    assert found.ids_BTK.tolist() == [[0, 2], [3, 2]]
    both = route_rows(logits, Router(normalise=True), 2, table, torch.tensor([1, 1]))
    assert both.ids_BTK.tolist() == [[0, 4], [3, 4]]


def test_budgets_per_rank_and_other_ranks_tokens_count_as_in_one_step() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(12, 32, generator=generator)
    rows_T = torch.randint(5, (12,), generator=generator)
    scope = BatchScope(Placement.linear(32, 2))
    levels = [(Rule(budget_per_rank=4), Rule(top_k=1)), (Rule(budget_per_rank=3), None)]
    table, router = RuleTable.of(4, levels), Router(normalise=True)
    wanted = route_rows(logits_TE, router, 4, table, rows_T, scope=scope)
    demands: list[Tensor] = []

    def listen(demand_3E: Tensor) -> Tensor:
        demands.append(demand_3E)
        return demand_3E

    halves = (slice(0, 5), slice(5, 12))
    for half in halves:
        heard = BatchScope(scope.placement, listen)
        route_rows(logits_TE[half], router, 4, table, rows_T[half], scope=heard)
    for half in halves:
        told = BatchScope(scope.placement, lambda _: demands[0] + demands[1])
        found = route_rows(logits_TE[half], router, 4, table, rows_T[half], scope=told)
        assert found.ids_BTK.tolist() == wanted.ids_BTK[half].tolist()
