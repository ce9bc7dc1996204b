"""Measured rows hold the model: between them their ratio is interpolated."""

from __future__ import annotations

import pytest

from leanmoe.predict.step.experts_time import Ratios


def test_between_measured_rows_the_ratio_is_interpolated() -> None:
    held = Ratios.of([(64, 1.4), (4, 1.0), (16, 1.2)])
    assert [held.at(n) for n in (1, 4, 16, 64, 999)] == pytest.approx([1.0, 1.0, 1.2, 1.4, 1.4])
    assert held.at(8) == pytest.approx(1.1)
    assert Ratios().at(7) == 1
