"""The order of experts: as the ranking, ties by lower id, unusable ones apart."""

from __future__ import annotations

import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.routing.scores import (
    is_usable,
    order_keys,
    put_first,
)

FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from((0.0, -0.0, 1.0))


@given(st.lists(FLOATS, min_size=1, max_size=12))
@settings(deadline=None)
def test_keys_order_as_floats_do_and_ties_by_lower_id(values: list[float]) -> None:
    values = [struct.unpack("f", struct.pack("f", value))[0] for value in values]
    keys = order_keys(torch.tensor([values]))
    expected = sorted(range(len(values)), key=lambda e: (-values[e], e))
    assert keys[0].argsort(descending=True).tolist() == expected
    assert len(set(keys[0].tolist())) == len(values)
    usable = is_usable(keys, len(values))[0].tolist()
    assert usable == [value > float("-inf") for value in values]


def test_chosen_slots_come_first_in_their_own_order() -> None:
    keys = order_keys(torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]))
    ids, chosen = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
    assert put_first(keys, ids, chosen)[0].argsort(descending=True).tolist() == [1, 2, 0, 3, 4]
