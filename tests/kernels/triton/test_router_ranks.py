"""route_gpu where experts lie on several ranks: budgets for each, and tokens of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton.router import MOST_TOKENS_OF_ALL, route_gpu_ids
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope, route
from tests.conformance.cases import ROUTERS
from tests.kernels.triton.routed import check_blocks, check_same, draw, route_here, there

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
