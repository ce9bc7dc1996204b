"""The verdict as a picture: well-formed, and it shows what the results say."""

from __future__ import annotations

from xml.etree import ElementTree

from leanmoe.report.verdict_svg import verdict_svg
from tests.report.example import tune_results


def test_it_is_well_formed_and_names_every_load() -> None:
    results = tune_results()
    words = [text.text or "" for text in ElementTree.fromstring(verdict_svg(results)).iter()]
    for gain in results.gain:
        assert f"concurrency {gain.concurrency}" in words
    assert "margin" in words


def test_a_load_without_a_plan_says_so() -> None:
    assert "no plan within the margin" in verdict_svg(tune_results(accepted=False))


def test_the_confidence_shown_is_the_one_asked_for() -> None:
    picture = verdict_svg(tune_results(confidence=0.8))
    assert "80% interval" in picture
    assert "95%" not in picture
