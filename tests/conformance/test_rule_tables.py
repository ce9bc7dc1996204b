"""Whatever routes by a table of rules gives what `leanmoe.routing.route_rows` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from leanmoe.kernels.cpu.router import route_cpu_unsupported
from leanmoe.kernels.dispatch import Route, route_by_reference, route_on_cpu, route_on_gpu
from leanmoe.kernels.rule_words import DeviceRules, TokenRules
from leanmoe.kernels.triton.router import route_gpu_unsupported
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope, Routing, RowRule, RuleTable
from tests.conformance.cases import ROUTERS, Case, TableCase, table_cases
from tests.conformance.implementations import DEVICE, IS_INTERPRETED
from tests.conformance.test_implementations import by_expert, is_clear

Levels = list[tuple[Rule, Rule | None]]
OTHER: Levels = [(Rule(top_k=1, threshold=0.5, renormalise=0.5), Rule(top_k=0))]
"""Levels of another band, which must not count."""


@dataclass(frozen=True)
class TableImplementation:
    """One implementation of what tables mean, and how many random cases are tried."""

    route: Route
    unsupported: Callable[..., str | None]
    examples: int
    takes_steps: bool
    device: str


IMPLEMENTATIONS = {
    "cpu": TableImplementation(route_on_cpu, route_cpu_unsupported, 150, True, "cpu"),
    "triton": TableImplementation(
        route_on_gpu, route_gpu_unsupported, 10 if IS_INTERPRETED else 100, False, DEVICE
    ),
}
EVERY = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def one_step(drawn: TableCase) -> TableCase:
    """The first of a case's steps."""
    case = drawn.case
    padding = None if case.padding_BT is None else case.padding_BT[0]
    case = replace(case, logits_BTE=case.logits_BTE[0], padding_BT=padding)
    return replace(drawn, case=case, rule_rows_BT=drawn.rule_rows_BT[0])


def token_rules(drawn: TableCase, device: str) -> TokenRules:
    """The table as the second of two bands."""
    case = drawn.case
    tables = [RuleTable.of(case.top_k, OTHER), drawn.table]
    ranks = 1 if case.placement is None else case.placement.ranks
    rules = DeviceRules(tables, case.router, case.top_k, case.experts, device, ranks=ranks)
    rules.band_1.fill_(1)
    return TokenRules(rules, drawn.rule_rows_BT.to(device))


def routed(route: Route, drawn: TableCase, device: str = "cpu") -> Routing:
    case, tokens = drawn.case, token_rules(drawn, device)
    logits, bias, padding = (
        None if x is None else x.to(device) for x in (case.logits_BTE, case.bias_E, case.padding_BT)
    )
    assert logits is not None
    scope = BatchScope(case.placement)
    found = route(logits, case.router, case.top_k, tokens, bias, padding, scope)
    return Routing(*(None if x is None else x.cpu() for x in found))  # type: ignore[arg-type]


def supported(name: str, drawn: TableCase) -> TableCase | None:
    """The case as the implementation takes it; None where it says that it cannot."""
    implementation = IMPLEMENTATIONS[name]
    drawn = drawn if implementation.takes_steps else one_step(drawn)
    tokens = token_rules(drawn, implementation.device)
    logits = drawn.case.logits_BTE.to(implementation.device)
    return None if implementation.unsupported(logits, drawn.case.router, tokens) else drawn


def check_same(name: str, drawn: TableCase) -> None:
    implementation, experts = IMPLEMENTATIONS[name], drawn.case.experts
    wanted = routed(route_by_reference, drawn)
    found = routed(implementation.route, drawn, implementation.device)
    assert found.ids_BTK.sort(dim=-1)[0].tolist() == wanted.ids_BTK.sort(dim=-1)[0].tolist()
    torch.testing.assert_close(
        by_expert(found, experts), by_expert(wanted, experts), atol=1e-5, rtol=1e-4
    )
    if wanted.over_budget_B is not None:  # another band's budget may be why a kernel says so too
        assert found.over_budget_B is not None
        assert found.over_budget_B.tolist() == wanted.over_budget_B.tolist()


def other_numbers(table: RuleTable, random: Random) -> Iterator[RowRule]:
    """The rows, those of batch-aware rules with numbers that no role has."""
    for row in table.rows:
        if row.rule.is_batch_aware:
            marks, own = random.randint(0, row.slots), random.randint(0, row.slots)
            row = replace(row, own=own, marks=marks, must=random.randint(0, marks))
        yield row


@EVERY
def test_random_tables_and_mixes_are_routed_as_by_the_reference(name: str) -> None:
    @settings(
        deadline=None,
        max_examples=IMPLEMENTATIONS[name].examples,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        database=None,
    )
    @given(table_cases(hostile=False), st.booleans(), st.randoms(use_true_random=False))
    def run(drawn: TableCase, has_own_numbers: bool, random: Random) -> None:
        if has_own_numbers:
            drawn = replace(drawn, table=RuleTable(tuple(other_numbers(drawn.table, random))))
        taken = supported(name, drawn)
        assume(taken is not None)
        assert taken is not None
        assume(all(is_clear(replace(taken.case, rule=row.rule)) for row in taken.table.rows))
        check_same(name, taken)

    run()


LEVELS: dict[str, Levels] = {
    "tokens alone": [
        (Rule(top_k=3), Rule(top_k=0)),
        (Rule(top_p=0.613, experts=tuple(range(1, 24))), Rule(top_k=2, renormalise=0.0)),
    ],
    "guaranteed": [
        (Rule(guaranteed=1), Rule(top_k=2)),
        (Rule(top_k=3, threshold=0.317, guaranteed=2, renormalise=0.5), None),
    ],
    "budget": [
        (Rule(budget=6), Rule(top_k=1)),
        (Rule(guaranteed=2, budget=9, experts=tuple(range(30))), Rule(threshold=0.613)),
    ],
    "budget and none": [(Rule(guaranteed=1), None), (Rule(top_k=3, budget=8), Rule(top_k=0))],
    "budgets of ranks": [
        (Rule(budget_per_rank=3), None),
        (Rule(budget_per_rank=2, budget=5, top_p=0.891), Rule(top_k=2)),
    ],
}
EXPERTS, TOKENS, TOP_K = 32, 10, 4


@EVERY
@pytest.mark.parametrize("levels", LEVELS)
def test_every_kind_of_table(name: str, levels: str) -> None:
    """Each with every router; in the interpreter with two each."""
    routers = list(ROUTERS)
    if name == "triton" and IS_INTERPRETED:
        place = list(LEVELS).index(levels)
        routers = [routers[place], routers[(place + 3) % len(routers)]]
    generator = torch.Generator().manual_seed(0)
    table = RuleTable.of(TOP_K, LEVELS[levels])
    placement = Placement.linear(EXPERTS, 2) if levels == "budgets of ranks" else None
    tried = 0
    for router in routers:
        logits_BTE = torch.randn(1, TOKENS, EXPERTS, generator=generator)
        bias_E = torch.randn(EXPERTS, generator=generator) * 0.1
        bias = bias_E if ROUTERS[router].ranking_bias is not None else None
        padding_BT = torch.arange(TOKENS)[None] == TOKENS - 1
        case = Case(router, logits_BTE, bias, padding_BT, TOP_K, Rule(), placement)
        rows_BT = torch.arange(TOKENS)[None] % (len(table.rows) + 1)  # the last is none
        taken = supported(name, TableCase(case, table, rows_BT))
        if taken is not None:
            check_same(name, taken)
            tried += 1
    if not tried:
        pytest.skip("it says that it cannot")


@EVERY
@pytest.mark.parametrize("levels", ["tokens alone", "guaranteed", "budget"])
def test_nan_in_a_token_is_nan_in_its_own_slots_alone(name: str, levels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTE = torch.randn(1, 5, EXPERTS, generator=generator)
    logits_BTE[0, 1:3, 7] = float("nan")
    table = RuleTable.of(TOP_K, [*LEVELS[levels], (Rule(), Rule(top_k=0))])
    rows_BT = torch.tensor([[0, 1, len(table.rows) - 1, 3, 4]])
    case = Case("softmax, normalised", logits_BTE, None, None, TOP_K, Rule())
    taken = supported(name, TableCase(case, table, rows_BT))
    if taken is None:
        pytest.skip("it says that it cannot")
    implementation = IMPLEMENTATIONS[name]
    found = routed(implementation.route, taken, implementation.device)
    weights_TK = found.weights_BTK.reshape(5, -1)
    assert weights_TK.isnan().any(dim=-1).tolist() == [False, True, False, False, False]
    assert found.ids_BTK.reshape(5, -1)[2].tolist() == [EXPERTS] * TOP_K
