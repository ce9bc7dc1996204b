"""What a layer's steps add up to."""

from __future__ import annotations

import torch

from leanmoe.runtime import RoutingCounts


def test_padding_is_no_token_and_a_skipped_slot_no_slot() -> None:
    counts = RoutingCounts()
    counts.add(torch.tensor([[[0, 1], [1, 8], [8, 8]]]), torch.tensor([[False, False, True]]), 8)
    counts.add(torch.tensor([[[5, 6], [7, 4]]]), None, 8)
    assert (counts.steps, counts.tokens, counts.slots) == (2, 4, 7)
    assert counts.slots_per_token == 7 / 4
    assert counts.distinct_per_step == (2 + 4) / 2
    assert counts.to_json() == {
        "tokens": 4, "slots": 7 / 4, "distinct": 3.0, "over_budget_steps": 0,
    }  # fmt: skip


def test_slots_of_padding_are_not_counted() -> None:
    """A model's own router chooses for padding too."""
    counts = RoutingCounts()
    counts.add(torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[False, True]]), 8)
    assert (counts.tokens, counts.slots, counts.distinct) == (1, 2, 2.0)


def test_a_layer_that_never_ran_has_means_of_zero() -> None:
    assert (RoutingCounts().slots_per_token, RoutingCounts().distinct_per_step) == (0.0, 0.0)
