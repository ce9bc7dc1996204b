"""Counters that programs share, and powers of two."""

from __future__ import annotations

import torch

from leanmoe.kernels.triton.state import power_of_two, zeros_for
from tests.kernels.triton.routed import DEVICE


def test_each_use_has_zeros_of_its_own_that_are_kept() -> None:
    device = torch.device(DEVICE)
    counters = zeros_for("a test", 8, device)
    assert counters.tolist() == [0] * 8
    assert zeros_for("a test", 8, device) is counters
    assert zeros_for("another test", 8, device) is not counters


def test_powers_of_two_are_not_below() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
