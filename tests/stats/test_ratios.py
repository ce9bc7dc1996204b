"""The interval of paired ratios against a calculation by hand."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.stats.ratios import Ratio


def test_the_interval_is_of_paired_ratios() -> None:
    first, other = [100.0, 200.0, 50.0], [110.0, 218.0, 55.5]
    found = Ratio.of(first, other)
    assert found.low < found.median < found.high
    assert found.low > 1.05, "repeats that differ twofold do not widen an interval of pairs"
    with pytest.raises(LeanMoeError, match="at least 2"):
        Ratio.of([1.0], [1.0])
