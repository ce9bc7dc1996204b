"""The study's modelled part: the U, the cited tables beside it, the regimes."""

from __future__ import annotations

import pytest

from leanmoe.results.study import Regimes
from leanmoe.study import paper
from leanmoe.study.simulated import U_SHAPES, analysis, banded, regimes, u_shape, v2_lite


@pytest.mark.parametrize("name", U_SHAPES)
def test_a_lower_k_gains_at_few_and_many_tokens_and_little_between(name: str) -> None:
    found = u_shape(name, U_SHAPES[name])
    where = found.regimes
    assert where.is_u
    assert where.flat_from is not None
    assert where.rises_from is not None
    assert where.peak < where.flat_from <= where.lowest < where.rises_from
    assert where.peak_gain > 3 * where.lowest_gain


def test_regimes_of_made_up_curves() -> None:
    tokens = [1, 2, 4, 8, 16]
    assert regimes(tokens, [30, 20, 5, 3, 25]) == Regimes(True, 1, 8, 30, 3, 4, 16)
    late = regimes(tokens, [0, 30, 3, 3, 25])
    assert (late.peak, late.lowest, late.is_u) == (2, 4, True)
    assert regimes(tokens, [30, 20, 10, 3, 3]).is_u is False
    assert regimes(tokens, [30, 30, 30, 30, 30]).is_u is False


def test_v2_lite_falls_and_rises_as_the_paper_has_it() -> None:
    rows = v2_lite(0.003).rows
    gains = {row.concurrency: row.gain["k=4"] for row in rows}
    assert gains[8] > gains[32] > gains[128] < gains[512]
    assert list(gains) == list(paper.V2_LITE_GAINS)


def test_the_analysis_has_the_right_width() -> None:
    found = analysis()
    assert found.too_much == pytest.approx((8 * 2048 + 18432) / (9 * 2048))
    first = found.rows[0].fine
    assert first.weight_bytes == pytest.approx(8 * 3 * 7168 * 2048, rel=0.001)
    assert first.flops == 2 * 8 * 3 * 7168 * 2048
    starts = found.compute_bound_from
    assert starts["coarse"] < starts["fine"]


def test_a_banded_plan_gains_more_than_uniform_k_where_few_tokens_decode() -> None:
    gains = banded(0.003).gains
    uniform = gains["uniform k = 6 (the paper's)"]
    other = next(values for name, values in gains.items() if name.startswith("banded"))
    assert other[4] > uniform[4]
