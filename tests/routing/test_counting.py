"""Distinct experts and slots of a step."""

from __future__ import annotations

import torch

from leanmoe.routing import count_distinct, count_slots


def test_skipped_slots_wake_nobody_and_count_for_nothing() -> None:
    ids = torch.tensor([[[0, 1], [1, 4]], [[4, 4], [4, 4]]])
    assert count_distinct(ids, 4).tolist() == [2, 0]
    assert count_slots(ids, 4).tolist() == [3, 0]
    assert int(count_distinct(ids[0], 4)) == 2
    assert int(count_slots(ids[0], 4)) == 3


def test_steps_are_counted_apart() -> None:
    ids = torch.randint(0, 9, (5, 7, 3), generator=torch.Generator().manual_seed(0))
    expected = [len(set(step.flatten().tolist()) - {8}) for step in ids]
    assert count_distinct(ids, 8).tolist() == expected
