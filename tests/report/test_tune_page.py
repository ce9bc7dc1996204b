"""The page of a tune run: every section, honest about refusals, careful with what it is given."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from leanmoe.core.intervals import PairedRatio, ReplyLengths
from leanmoe.plan import Plan
from leanmoe.report.tune_page import headline, is_restricted, tune_page
from tests.report import example

PLAN = Plan.from_json(example.plan())


def text_of(html: str) -> str:
    """A page without its scripts."""
    return re.sub(r"<script.*?</script>", "", html, flags=re.S)


def test_page_shows_every_section_and_escapes_names() -> None:
    html = text_of(tune_page(example.tune_results(with_budget=True), PLAN))
    for title in (
        "Verdict per load",
        "Gain over load",
        "Quality against speed at concurrency 8",
        "The plan",
        "Every strategy on the same budget, concurrency 8",
        "Fewer experts in total, or fewer a token?",
        "What the router does",
        "How this was made",
    ):
        assert f"<h2>{title}" in html
    assert "reference &lt;model&gt;" in html
    assert "reference <model>" not in html


def test_headline_names_gain_interval_and_bound() -> None:
    text = headline(example.tune_results())
    assert "+15.0%" in text
    assert "+10.0% to +20.0%" in text
    assert "margin 0.5%" in text


@pytest.mark.parametrize(("confidence", "shown"), [(0.8, "80%"), (0.975, "97.5%")])
def test_the_confidence_shown_is_the_one_asked_for(confidence: float, shown: str) -> None:
    results = example.tune_results(confidence=confidence, with_budget=True)
    html = text_of(tune_page(results, PLAN))
    assert "95%" not in headline(results) + html
    assert f"({shown} interval" in headline(results)
    for heading in ("loss at most", "loss", "over leanmoe"):
        assert f"<th>{heading} ({shown})</th>" in html
    assert html.count(f"{shown} intervals") == 4


def test_without_an_accepted_plan_the_page_says_so() -> None:
    refused = example.tune_results(accepted=False)
    assert "there is no such level" in headline(refused)
    empty = Plan.from_json({**example.plan(), "bands": []})
    assert "The plan is empty." in tune_page(refused, empty)
    assert not is_restricted(refused)


def test_the_gain_per_finished_request_is_shown_or_that_it_is_not_measurable() -> None:
    results = example.tune_results()
    first, *rest = results.verdicts
    ended = ReplyLengths(32, 128, 30, 29, 28, PairedRatio(1.1, 1.05, 1.15))
    few = ReplyLengths(32, 128, 3, None, 0, None)
    shown = replace(first, replies=ended, per_request=PairedRatio(1.045, 0.98, 1.11))
    unknown = replace(rest[0], replies=few)
    both = replace(results, verdicts=(shown, unknown, *rest[1:]))
    html = text_of(tune_page(both, PLAN))
    assert "+4.5% <small>(-2.0% to +11.0%)</small>" in html
    assert html.count("<td>not measurable</td>") == 1
    assert "not measurable" not in text_of(tune_page(results, PLAN))
