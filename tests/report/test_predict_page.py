"""The page of a sweep: fronts, the cheapest deployments and what did not fit."""

from __future__ import annotations

import re
from dataclasses import replace

from leanmoe.report.predict_page import predict_page
from tests.results.test_predict import SWEEP


def test_every_section_is_shown() -> None:
    html = re.sub(r"<script.*?</script>", "", predict_page(SWEEP), flags=re.S)
    assert "leanmoe predict: a &lt;model&gt; on h200" in html
    assert "1,000 configurations" in html
    assert "TPOT at most 30 ms. GPUs saved are at equal load." in html
    assert "8 GPUs, TP4 EP8 DP2" in html
    assert "none meets the limits" in html
    assert "the weights do not fit" in html


def test_nothing_refused_is_said() -> None:
    assert "Every split fitted." in predict_page(replace(SWEEP, refused={}))
