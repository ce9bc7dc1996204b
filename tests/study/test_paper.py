"""The paper's own figures."""

from __future__ import annotations

import pytest

from leanmoe.study import paper


def test_where_table_9_breaks_its_own_trend() -> None:
    found = {(load, k): points for load, k, points in paper.trend_breaks(3)}
    assert {(32, 6), (32, 4), (32, 3)} <= set(found)
    ratio = {load: row[6] / row[8] for load, row in paper.TABLE_9.items()}
    trend = (ratio[16] * ratio[64]) ** 0.5
    assert found[32, 6] == pytest.approx(100 * (ratio[32] / trend - 1))
    assert (16, 6) not in found
    assert paper.trend_breaks(1000) == []
