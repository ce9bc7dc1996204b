"""A curve keeps its points and goes on beyond the last one."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.experts.curves import from_points


def test_a_measured_curve_is_kept_and_goes_on_beyond_its_last_point() -> None:
    curve = from_points([(1, 8, 8), (16, 60, 8), (4, 28, 8)], 64, "measured")
    assert curve.at(4) == (28, 8)
    assert 28 < curve.at(8)[0] < 60
    assert 60 < curve.at(64)[0] <= 64
    with pytest.raises(LeanMoeError, match="at least one point"):
        from_points([], 64, "measured")
