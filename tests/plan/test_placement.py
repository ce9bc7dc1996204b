"""Which rank has which expert."""

from __future__ import annotations

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan.placement import Placement
from leanmoe.routing import count_distinct_by_rank
from leanmoe.routing.batch_rules import (
    by_rank,
    from_ranks,
)


def test_blocks_and_turns() -> None:
    assert Placement.linear(8, 2).rank_of == (0, 0, 0, 0, 1, 1, 1, 1)
    assert Placement.round_robin(8, 2).rank_of == (0, 1) * 4
    assert Placement.linear(5, 1) == Placement.round_robin(5, 1)


def test_the_first_ranks_have_what_does_not_divide() -> None:
    linear, turns = Placement.linear(11, 4), Placement.round_robin(11, 4)
    assert [len(linear.experts_on(rank)) for rank in range(4)] == [3, 3, 3, 2]
    assert [len(turns.experts_on(rank)) for rank in range(4)] == [3, 3, 3, 2]
    assert linear.experts_on(1) == (3, 4, 5)
    assert turns.experts_on(1) == (1, 5, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Placement.linear(8, 0), "ranks is 0: it must be 1 to 8"),
        (lambda: Placement.linear(8, -1), "ranks is -1: it must be 1 to 8"),
        (lambda: Placement.round_robin(8, 9), "ranks is 9: it must be 1 to 8"),
        (lambda: Placement.round_robin(8, 0), "ranks is 0"),
        (lambda: Placement((0, 2), 2), "expert 1 is placed on rank 2: it must be 0 to 1"),
        (lambda: Placement((0, -1), 2), "expert 1 is placed on rank -1"),
        (lambda: Placement.linear(8, 2).check(16), "of 8 experts: the model has 16"),
    ],
)
def test_what_is_out_of_range_is_named(make: object, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "placement",
    [Placement.linear(7, 3), Placement.round_robin(7, 3), Placement((2, 0, 0, 0, 2, 0, 0), 4)],
    ids=["linear", "round robin", "two ranks with none"],
)
def test_values_come_back_from_their_ranks(placement: Placement) -> None:
    values = torch.arange(14).view(2, 7)
    sorted_by_rank = by_rank(values, placement, fill=-1)
    for rank in range(placement.ranks):
        held = sorted_by_rank[0, rank]
        assert held[held >= 0].tolist() == list(placement.experts_on(rank))
    assert torch.equal(from_ranks(sorted_by_rank, placement), values)


def test_distinct_experts_are_counted_where_they_are() -> None:
    ids = torch.tensor([[[0, 1, 4], [1, 7, 8]], [[8, 8, 8], [8, 8, 8]]])
    assert count_distinct_by_rank(ids, Placement.linear(8, 2)).tolist() == [[2, 2], [0, 0]]
    assert count_distinct_by_rank(ids, Placement.round_robin(8, 2)).tolist() == [[2, 2], [0, 0]]
    assert count_distinct_by_rank(ids[0], Placement.linear(8, 4)).tolist() == [2, 0, 1, 1]
