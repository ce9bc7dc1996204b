"""The page: self-contained, honest about refusals, and careful with what it is given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.report import plots, write_report
from leanmoe.report.page import BUTTONS, headline, number_cell, page, plot
from leanmoe.results.tune import describe_rule, read_results
from tests.report import example


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(example.results()))
    (tmp_path / "plan.json").write_text(json.dumps(example.plan()))
    return tmp_path


def test_page_is_one_file_that_asks_no_network(run: Path) -> None:
    html = write_report(run).read_text()
    scripts = re.findall(r"<script[^>]*\bsrc=", html)
    links = re.findall(r"<link\b", html)
    assert (scripts, links) == ([], [])
    assert html.count("plotly.js v") == 1


def test_page_shows_every_section_and_escapes_names(run: Path) -> None:
    html = write_report(run).read_text()
    for title in ("Verdict per load", "Gain over load", "The plan", "What the router does"):
        assert f"<h2>{title}" in html
    assert "reference &lt;model&gt;" in html
    assert "reference <model>" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)


@pytest.mark.parametrize(
    ("value", "cell"),
    [(None, ""), (0.01234567, "0.01235"), (71.8, "71.8"), (1132.97, "1,133"), (14273.4, "14,273")],
)
def test_figures_are_never_powers_of_ten(value: float | None, cell: str) -> None:
    assert number_cell(value) == cell


def test_plots_stay_readable_in_a_narrow_window(run: Path) -> None:
    """They are scrolled, and the buttons above them leave room for a legend."""
    html = plot(plots.front(read_results(run / "results.json"), 8))
    assert html.startswith('<div class="scroll">')
    assert json.dumps({"modeBarButtons": BUTTONS})[1:-1] in html
    assert len(BUTTONS[0]) == 2


@pytest.mark.parametrize("times", [[0.531], [0.531, 0.534, 0.552]])
def test_ticks_of_times_that_lie_close_differ(run: Path, times: list[float]) -> None:
    results = read_results(run / "results.json")
    front = next(f for f in results["fronts"] if f["concurrency"] == 8)
    front["points"] = [{**front["points"][0], "modelled_time": time} for time in times]
    axis = plots.front(results, 8).layout.xaxis
    assert axis.tickformat == "~%"
    assert 0.5 < axis.range[0] < min(times) <= max(times) < axis.range[1] < 0.6


def test_headline_names_gain_interval_and_bound() -> None:
    text = headline(example.results())
    assert "+15.0%" in text
    assert "+10.0% to +20.0%" in text
    assert "margin +0.5%" in text


@pytest.mark.parametrize(("confidence", "shown"), [(0.8, "80%"), (0.975, "97.5%")])
def test_the_confidence_shown_is_the_one_asked_for(confidence: float, shown: str) -> None:
    results = example.results()
    results["settings"]["confidence"] = confidence
    results["total_or_activated"] = [
        {**row, "memory": 0.5, "time": 0.5} for row in example.totals()
    ]
    html = re.sub(r"<script.*?</script>", "", page(results, example.plan()), flags=re.S)
    assert "95%" not in headline(results) + html
    assert f"({shown} interval" in headline(results)
    for heading in ("loss at most", "loss", "over leanmoe"):
        assert f"<th>{heading} ({shown})</th>" in html
    assert html.count(f"{shown} intervals") == 4


def test_without_an_accepted_plan_the_page_says_so() -> None:
    refused = example.results(accepted=False)
    assert "plan stays empty" in headline(refused)
    empty = {**example.plan(), "bands": []}
    assert "The plan is empty." in page(refused, empty)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"leanmoe_results": 7}, "schema version 7"), ({"fronts": None}, "fronts is missing")],
)
def test_results_of_another_form_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    results = {k: v for k, v in {**example.results(), **change}.items() if v is not None}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(LeanMoeError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "full"),
        ({"top_k": 6, "guaranteed": 3}, "top_k 6, guaranteed 3"),
        ({"experts": [1, 2]}, "2 experts"),
    ],
)
def test_rules_in_words(rule: dict[str, object], words: str) -> None:
    assert describe_rule(rule) == words
