"""The page of an evaluation, from results that are committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.report.eval_page import eval_page
from leanmoe.results.eval import EvalResults
from tests.results.committed import committed

PATHS = committed("leanmoe_eval")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_committed_results_have_a_page_without_script(path: Path) -> None:
    results = EvalResults.read(path)
    html = eval_page(results)
    assert "<h1>What plans cost: reference</h1>" in html
    assert "<script" not in html
    assert results.plans[0].name in html


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_confidence_shown_is_the_one_asked_for(path: Path) -> None:
    results = EvalResults.read(path)
    html = eval_page(replace(results, settings={**results.settings, "confidence": 0.8}))
    assert "[80%]" in html
    assert "[95%]" not in html
