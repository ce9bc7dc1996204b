"""The report of prune is read as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import Provenance
from leanmoe.results.prune import PruneReport, RankedBy

REPORT = PruneReport(
    settings={"keep": "75%"},
    criterion=RankedBy("mean gate", "arXiv 2510.13999"),
    calibration_tokens=1000,
    protected=((0, 3),),
    provenance=Provenance("2026-01-01", "a CPU", 2, {"torch": "2"}, "abc", 0, "leanmoe prune"),
    kept=((0, 1), (1, 3)),
)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "leanmoe_prune.json")
    assert PruneReport.load(tmp_path / "leanmoe_prune.json") == REPORT


def test_another_version_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="report of prune has schema version 2"):
        PruneReport.from_json({**REPORT.to_json(), "leanmoe_prune": 2})
