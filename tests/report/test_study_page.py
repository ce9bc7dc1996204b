"""The page of the study, from results that are committed."""

from __future__ import annotations

import re
from dataclasses import replace

from markupsafe import escape

from leanmoe.report.study_page import GROUPS, study_page
from leanmoe.results.study import StudyResults
from tests.results.committed import committed

RESULTS = StudyResults.load(committed("leanmoe_study")[0])


def text_of(results: StudyResults) -> str:
    """A page without its scripts."""
    return re.sub(r"<script.*?</script>", "", study_page(results), flags=re.S)


def test_every_section_is_shown() -> None:
    html = text_of(RESULTS)
    for title in (
        "The paper&#39;s claims",
        "DeepSeek-V3 on 8 x h200 (TP8)",
        "What moves these ratios",
        "DeepSeek-V2-Lite on",
        "The U: where a lower k gains",
        "Intensity and bytes of a MoE layer",
        "Quality on reference",
        "What a searched plan gave where it was measured",
        "What a banded plan would give",
        "How far off the model has been",
    ):
        assert f"<h2>{title}" in html
    for group in {row.group for row in RESULTS.quality.rows} if RESULTS.quality else ():
        assert f"<h3>{escape(GROUPS[group])}</h3>" in html


def test_a_study_without_measurements_has_a_page() -> None:
    html = text_of(replace(RESULTS, quality=None, searched=None, what_moves=()))
    assert "Quality on" not in html
    assert "The paper&#39;s claims" in html


def test_the_confidence_shown_is_the_one_asked_for() -> None:
    assert RESULTS.quality
    assert RESULTS.searched
    html = text_of(
        replace(
            RESULTS,
            quality=replace(RESULTS.quality, confidence=0.8),
            searched=replace(RESULTS.searched, confidence=0.9),
        )
    )
    assert "interval (80%)" in html
    assert "loss at most (90%)" in html
    assert not re.search(r"(?<![\d.])95%", html.replace("<td>95%</td>", ""))
