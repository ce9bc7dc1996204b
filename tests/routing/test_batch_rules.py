"""What tokens demand, and which experts that activates."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing.batch_rules import count_demand, select_active_experts
from tests.conformance.cases import placements

EXPERTS = 10


def active(mask_E: Tensor) -> set[int]:
    return set(mask_E.nonzero().flatten().tolist())


def decided(
    ids: Tensor, kept: Tensor | None, votes: Tensor, rule: Rule, placement: Placement | None = None
) -> tuple[set[int], bool]:
    demand = count_demand(ids, kept, EXPERTS, rule.guaranteed, votes)
    chosen, over = select_active_experts(demand, rule, placement)
    return active(chosen), bool(over)


def test_guaranteed_is_the_union_of_the_first_slots_that_are_kept() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 0, 4], [5, 6, 7]])
    kept = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    chosen, over = select_active_experts(count_demand(ids, kept, 8, 2), Rule(guaranteed=2))
    assert active(chosen) == {0, 1, 3}
    assert over is None


def test_budget_buys_the_most_voted_for_after_every_best() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 2, 1]])
    votes = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2]])
    for budget, expected in ((3, {0, 2, 3}), (2, {0, 3}), (8, {0, 1, 2, 3})):
        assert decided(ids, None, votes, Rule(budget=budget)) == (expected, False)
    assert decided(ids, None, votes, Rule(budget=1)) == ({0, 3}, True)


def test_a_full_rank_is_passed_over_for_the_next() -> None:
    """Experts 0 to 4 are on rank 0, the others on rank 1; 1 and 2 are wanted more than 7."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 7], [0, 2, 1]])
    votes = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    two = Placement.linear(EXPERTS, 2)
    assert decided(ids, None, votes, Rule(budget=3), two) == ({0, 1, 2}, False)
    assert decided(ids, None, votes, Rule(budget_per_rank=2), two) == ({0, 1, 7}, False)
    assert decided(ids, None, votes, Rule(budget_per_rank=1), two) == ({0, 7}, False)
    assert decided(ids, None, votes, Rule(budget=2, budget_per_rank=2), two) == ({0, 1}, False)


def test_bests_that_one_rank_cannot_hold_all_stay() -> None:
    ids = torch.tensor([[0, 7], [1, 7], [2, 8]])
    votes = torch.tensor([[0.9, 0.1]] * 3)
    rule = Rule(budget_per_rank=2)
    found = decided(ids, None, votes, rule, Placement.linear(EXPERTS, 2))
    assert found == ({0, 1, 2, 7, 8}, True)
    assert decided(ids, None, votes, rule, Placement.linear(EXPERTS, 10))[1] is False


def test_a_vote_too_small_to_count_is_still_a_vote() -> None:
    ids, votes = torch.tensor([[0, 5]]), torch.tensor([[1.0, 0.0]])
    assert decided(ids, None, votes, Rule(budget=2))[0] == {0, 5}


def test_no_tokens_activate_no_expert() -> None:
    ids = torch.empty(0, 4, dtype=torch.int64)
    rule = Rule(guaranteed=2, budget=3, budget_per_rank=2)
    assert decided(ids, None, torch.empty(0, 4), rule) == (set(), False)


@given(st.data())
@settings(deadline=None)
def test_budgets_are_those_of_a_loop_with_ties(data: st.DataObject) -> None:
    """Votes in sixteenths, which floats add exactly."""
    tokens, slots = data.draw(st.integers(1, 6)), 4
    order = st.permutations(range(EXPERTS)).map(lambda p: list(p)[:slots])
    ids = [data.draw(order) for _ in range(tokens)]
    count = st.lists(st.integers(0, 16), min_size=slots, max_size=slots)
    votes = [data.draw(count) for _ in range(tokens)]
    used = [data.draw(st.integers(0, slots)) for _ in range(tokens)]
    limits = data.draw(st.sampled_from(("budget", "budget_per_rank", "both")))
    budget = data.draw(st.integers(1, EXPERTS)) if limits != "budget_per_rank" else EXPERTS
    each = data.draw(st.integers(1, 4)) if limits != "budget" else EXPERTS
    placement = data.draw(placements(EXPERTS))

    total = {
        e: sum(votes[t][s] + 1e-9 for t in range(tokens) for s in range(used[t]) if ids[t][s] == e)
        for e in {e for t in range(tokens) for e in ids[t][: used[t]]}
    }

    def on_rank(rank: int) -> int:
        return sum(placement.rank_of[e] == rank for e in expected)

    expected = {ids[t][0] for t in range(tokens) if used[t]}
    too_few = len(expected) > budget or any(on_rank(r) > each for r in range(5))
    for expert in sorted(total, key=lambda e: (-total[e], e)):
        has_room = len(expected) < budget and on_rank(placement.rank_of[expert]) < each
        if expert not in expected and has_room:
            expected.add(expert)

    rule = Rule(
        budget=None if limits == "budget_per_rank" else budget,
        budget_per_rank=None if limits == "budget" else each,
    )
    kept = torch.arange(slots) < torch.tensor(used).unsqueeze(-1)
    found = decided(torch.tensor(ids), kept, torch.tensor(votes) / 16, rule, placement)
    assert found == (expected, too_few)
