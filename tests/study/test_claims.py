"""A claim's verdict follows the figures: claims can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.core.intervals import LossChange
from leanmoe.results.study import QualityRow, StudiedQuality, StudyResults
from leanmoe.study.claims import BEST_SHAPE, quality_claims, speed_claims

(STUDY,) = (Path(__file__).parents[2] / "benchmarks/results").glob("*-study.json")


def row(group: str, name: str, ratio: float, low: float) -> QualityRow:
    change = LossChange(ratio, low, ratio + 0.01, ratio + 0.01, 30)
    return QualityRow(group, name, 6.0, 1.0, change)


@pytest.mark.parametrize(("low", "verdict"), [(0.02, "not confirmed"), (-0.01, "partly")])
def test_a_verdict_follows_the_interval(low: float, verdict: str) -> None:
    measured = StudyResults.load(STUDY).quality
    assert isinstance(measured, StudiedQuality)
    rows = (
        row("k", "k=6", 0.03, low),
        row("k, weights kept", "k=6", 0.006, low),
        row("shape", BEST_SHAPE, 0.01, low),
    )
    claims = quality_claims(replace(measured, rows=rows))
    assert [claim.verdict for claim in claims] == [verdict, verdict]
    assert list(quality_claims(replace(measured, rows=()))) == []


def test_a_committed_studys_claims_are_made_again_word_by_word() -> None:
    results = StudyResults.load(STUDY)
    assert results.quality is not None
    claims = speed_claims(results.table_9, results.v2_lite, results.banded, results.analysis)
    claims += quality_claims(results.quality)
    made = [(each.claim, each.paper, each.ours, each.verdict) for each in claims]
    assert made == [(each.claim, each.paper, each.ours, each.verdict) for each in results.claims]
