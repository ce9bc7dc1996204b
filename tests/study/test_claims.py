"""A claim's verdict follows the figures: claims can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.core.intervals import LossChange
from leanmoe.results.study import QualityRow, StudiedQuality, StudyResults
from leanmoe.study.claims import BEST_SHAPE, claims_of, quality_claims

(STUDY,) = (Path(__file__).parents[2] / "benchmarks/results").glob("*-study.json")
VERDICTS = {"confirmed", "partly", "not confirmed", "not tested"}


def row(group: str, name: str, ratio: float, low: float) -> QualityRow:
    change = LossChange(ratio, low, ratio + 0.01, ratio + 0.01, 30)
    return QualityRow(group, name, 6.0, 1.0, change)


@pytest.mark.parametrize(
    ("low", "verdicts"),
    [(0.02, ["partly", "partly", "not confirmed"]), (-0.01, ["confirmed", "confirmed", "partly"])],
)
def test_a_verdict_follows_the_interval(low: float, verdicts: list[str]) -> None:
    results = StudyResults.load(STUDY)
    assert isinstance(results.quality, StudiedQuality)
    rows = (
        row("k", "k=6", 0.03, low),
        row("k, weights kept", "k=6", 0.006, low),
        row("shape", BEST_SHAPE, 0.01, low),
    )
    claims = quality_claims(replace(results.quality, rows=rows), results.table_9)
    assert [claim.verdict for claim in claims] == verdicts
    assert not list(quality_claims(replace(results.quality, rows=()), results.table_9))


def test_a_verdict_on_pruning_follows_the_intervals() -> None:
    results = StudyResults.load(STUDY)
    assert results.quality is not None
    worse = [
        replace(each, increase=LossChange(0.9, 0.8, 0.99, 0.99, 30))
        for each in results.quality.rows
        if each.name == "random"
    ]
    rows = [*(each for each in results.quality.rows if each.name != "random"), *worse]
    claims = quality_claims(replace(results.quality, rows=tuple(rows)), results.table_9)
    verdicts = {claim.claim: claim.verdict for claim in claims}
    assert verdicts["Experts that are used least can be pruned"] == "confirmed"


def test_a_committed_studys_claims_are_made_again_word_by_word() -> None:
    results = StudyResults.load(STUDY)
    assert tuple(claims_of(results)) == results.claims
    assert {claim.verdict for claim in results.claims} <= VERDICTS
