"""guaranteed and budget: which experts a step wakes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.routing.company import budgeted_experts, guaranteed_experts


def awake(mask_E: torch.Tensor) -> set[int]:
    return set(mask_E.nonzero().flatten().tolist())


def test_guaranteed_is_the_union_of_the_first_slots_that_are_kept() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 0, 4], [5, 6, 7]])
    kept = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert awake(guaranteed_experts(ids, kept, 2, 8)) == {0, 1, 3}


def test_budget_buys_the_most_voted_for_after_every_best() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 2, 1]])
    votes = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2]])
    kept = torch.ones_like(ids, dtype=torch.bool)
    for budget, expected in ((3, {0, 2, 3}), (2, {0, 3}), (8, {0, 1, 2, 3})):
        chosen, over = budgeted_experts(ids, kept, votes, budget, 8)
        assert awake(chosen) == expected
        assert not over
    chosen, over = budgeted_experts(ids, kept, votes, 1, 8)
    assert awake(chosen) == {0, 3}
    assert over


def test_a_vote_too_small_to_count_is_still_a_vote() -> None:
    ids, votes = torch.tensor([[0, 5]]), torch.tensor([[1.0, 0.0]])
    chosen, _ = budgeted_experts(ids, torch.ones(1, 2, dtype=torch.bool), votes, 2, 8)
    assert awake(chosen) == {0, 5}


@given(st.data())
@settings(deadline=None)
def test_budget_is_that_of_a_loop_with_ties(data: st.DataObject) -> None:
    """Votes in sixteenths, which floats add exactly."""
    tokens, slots, experts = data.draw(st.integers(1, 6)), 4, 10
    order = st.permutations(range(experts)).map(lambda p: list(p)[:slots])
    ids = [data.draw(order) for _ in range(tokens)]
    count = st.lists(st.integers(0, 16), min_size=slots, max_size=slots)
    votes = [data.draw(count) for _ in range(tokens)]
    used = [data.draw(st.integers(0, slots)) for _ in range(tokens)]
    budget = data.draw(st.integers(1, experts))

    total = {
        e: sum(votes[t][s] + 1e-9 for t in range(tokens) for s in range(used[t]) if ids[t][s] == e)
        for e in {e for t in range(tokens) for e in ids[t][: used[t]]}
    }
    best = {ids[t][0] for t in range(tokens) if used[t]}
    expected = set(best)
    for expert in sorted(total, key=lambda e: (-total[e], e)):
        if expert not in expected and len(expected) < budget:
            expected.add(expert)

    kept = torch.arange(slots) < torch.tensor(used).unsqueeze(-1)
    chosen, over = budgeted_experts(
        torch.tensor(ids), kept, torch.tensor(votes) / 16, budget, experts
    )
    assert awake(chosen) == expected
    assert bool(over) == (len(best) > budget)
