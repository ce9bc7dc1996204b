"""The verdict as a picture: well-formed, and it shows what the results say."""

from __future__ import annotations

from xml.etree import ElementTree

from leanmoe.report.svg import verdict_svg
from leanmoe.results.tune import describe_rule
from tests.report.example import results


def test_it_is_well_formed_and_names_every_load() -> None:
    picture = verdict_svg(results())
    words = [text.text or "" for text in ElementTree.fromstring(picture).iter() if text.text]
    for entry in results()["gain"]:
        assert f"{entry['concurrency']} at once" in words
    assert "margin" in words


def test_a_load_without_a_plan_says_so() -> None:
    assert "no plan within the margin" in verdict_svg(results(accepted=False))


def test_kept_weights_are_said() -> None:
    assert describe_rule({"top_k": 6, "keep_weights": True}) == "top_k 6, weights kept"
