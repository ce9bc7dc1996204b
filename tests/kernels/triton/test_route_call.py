"""What a call of the route programs is compiled for, and what it reads as data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.kernels.rule_words import DeviceRules, TokenRules
from leanmoe.kernels.triton.route_call import RouteCall
from leanmoe.kernels.triton.router import route_gpu
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import RuleTable, route_rows
from tests.conformance.cases import ROUTERS
from tests.kernels.triton.routed import DEVICE, check_blocks, check_same, draw, route_here

LEVELS = [(Rule(guaranteed=2, threshold=0.3, budget=9), Rule(top_k=0))]


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each launch from now on is compiled for: constants, and the types of arguments."""
    seen: list[tuple[Any, ...]] = []
    run = RouteCall.run

    def noting(self: RouteCall, program: Any, *arguments: Any, **options: Any) -> None:
        kinds = [a.dtype if isinstance(a, Tensor) else type(a) for a in arguments]
        seen.append((program, kinds, self._options, options))
        run(self, program, *arguments, **options)

    monkeypatch.setattr(RouteCall, "run", noting)
    return seen


def test_rules_rows_and_band_are_data_and_nothing_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, _ = draw(7, 32)
    router = ROUTERS["softmax, normalised"]
    other = RuleTable.of(4, [(Rule(top_k=1), None)])
    tables = [RuleTable.of(4, LEVELS), other]
    rules = DeviceRules(tables, router, 4, 32, DEVICE)
    rows_T = torch.tensor([0, 1, 2, 1, 0, 2, 1], device=DEVICE, dtype=torch.int16)
    tokens, seen = TokenRules(rules, rows_T), launches(monkeypatch)

    def check(table: RuleTable) -> None:
        found = route_here(logits, router, 4, tokens)
        wanted = route_rows(logits, router, 4, table, rows_T.cpu())
        check_same(found._replace(over_budget=None), wanted._replace(over_budget_B=None), 32)
        check_blocks(found, 32)

    check(tables[0])
    rows_T.copy_(torch.tensor([1, 1, 1, 0, 2, 2, 9]))
    check(tables[0])
    rules.band_1.fill_(1)
    check(other)
    changed = RuleTable.of(4, [(Rule(guaranteed=1, budget=5), Rule(top_k=2))])
    rules.write([other, changed])
    check(changed)
    first, second, *others = seen
    assert others == [first, second] * 3


def test_one_rule_for_all_knows_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = launches(monkeypatch)
    for rule in (Rule(), Rule(budget=5)):
        route_here(*draw(3, 32)[:1], Router(), 4, rule)
    for _program, kinds, constants, _options in seen:
        assert not constants["TABLE"]
        assert kinds[-4:] == [type(None)] * 4


@pytest.mark.skipif(DEVICE == "cpu", reason="there are no graphs to capture without a GPU")
@pytest.mark.parametrize("levels", [LEVELS, [(Rule(top_k=2), Rule(top_k=0))]], ids=str)
def test_a_graph_follows_what_rows_band_and_rules_are_when_it_is_replayed(
    levels: list[tuple[Rule, Rule | None]],
) -> None:
    logits_TE = draw(9, 32)[0].to(DEVICE)
    router = ROUTERS["softmax, normalised"]
    other = RuleTable.of(4, [(Rule(top_k=1), None)])
    tables = [RuleTable.of(4, levels), other]
    rules = DeviceRules(tables, router, 4, 32, DEVICE)
    rows_T = torch.zeros(9, device=DEVICE, dtype=torch.int32)
    arguments = (logits_TE, router, 4, TokenRules(rules, rows_T))
    route_gpu(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = route_gpu(*arguments)
    generator = torch.Generator().manual_seed(0)
    for band in (0, 1, 0):
        rows_T.copy_(torch.randint(4, (9,), generator=generator))
        rules.band_1.fill_(band)
        graph.replay()
        eager = route_gpu(*arguments)
        wanted = route_rows(logits_TE, router, 4, tables[band], rows_T)
        assert found.ids_TK.tolist() == eager.ids_TK.tolist()
        assert found.weights_TK.tolist() == eager.weights_TK.tolist()
        assert found.ids_TK.sort()[0].tolist() == wanted.ids_BTK.sort()[0].tolist()
