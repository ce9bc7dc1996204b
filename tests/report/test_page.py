"""Pages are one file that asks no network, and figures read well in any window."""

from __future__ import annotations

import json
import re

import pytest

from leanmoe.core.intervals import LossChange, LossGap, Margin, MeanChange, RatioOfRuns
from leanmoe.plan import Plan
from leanmoe.report import plots
from leanmoe.report.page import CONFIG, interval, number, plot, render, sure
from leanmoe.report.tune_page import tune_page
from tests.report import example


def test_page_is_one_file_that_asks_no_network() -> None:
    html = tune_page(example.tune_results(), Plan.from_json(example.plan()))
    assert re.findall(r"<script[^>]*\bsrc=|<link\b|<img\b|@import", html) == []
    assert html.count("plotly.js v") == 1
    assert not re.findall(r"https?://", re.sub(r"<script.*?</script>", "", html, flags=re.S))


def test_a_page_without_plots_has_no_script() -> None:
    html = render("page.html.j2", title="a <title>")
    assert "<script" not in html
    assert "<title>a &lt;title&gt;</title>" in html


@pytest.mark.parametrize(
    ("value", "cell"),
    [(None, ""), (0.01234567, "0.01235"), (71.8, "71.8"), (1132.97, "1,133"), (14273.4, "14,273")],
)
def test_figures_are_never_powers_of_ten(value: float | None, cell: str) -> None:
    assert number(value) == cell


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (LossChange(0.01, 0.005, 0.015, 0.014, 9), "+1.00% <small>(+0.50% to +1.50%)</small>"),
        (LossGap(0.01, -0.005, 0.015), "+1.00% <small>(-0.50% to +1.50%)</small>"),
        (RatioOfRuns(1.15, 1.1, 1.2, 5), "+15.0% <small>(+10.0% to +20.0%)</small>"),
        (MeanChange(-0.01, -0.02, 0.0), "-1.00% <small>(-2.00% to +0.00%)</small>"),
    ],
)
def test_changes_stand_with_their_intervals(value: LossChange, cell: str) -> None:
    assert interval(value) == cell


def test_a_confidence_keeps_its_digits() -> None:
    assert [sure(each) for each in (0.8, 0.95, 0.975)] == ["80%", "95%", "97.5%"]


def test_plots_stay_readable_in_a_narrow_window() -> None:
    """They are scrolled, and the buttons above them leave room for a legend."""
    html = plot(plots.loss_front(example.tune_results().fronts[1], Margin(0.005)))
    assert html.startswith('<div class="scroll">')
    assert json.dumps({"modeBarButtons": CONFIG["modeBarButtons"]})[1:-1] in html
    assert CONFIG["modeBarButtons"] == [["toImage", "resetScale2d"]]


def test_the_same_results_give_the_same_page() -> None:
    results, plan = example.tune_results(), Plan.from_json(example.plan())
    assert tune_page(results, plan) == tune_page(results, plan)
