"""Tables of pruning's results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.pruning.table import one_table, show, shown

RESULTS = Path(__file__).parents[3] / "benchmarks/results"


def test_a_share_is_shown_in_percent() -> None:
    assert shown({"ratio": 0.0123, "low": -0.001, "high": 0.02}) == "+1.23% [-0.10, +2.00]"


def test_every_setting_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(sorted(RESULTS.glob("*-pruning.json"))[-1].read_text())
    assert len(one_table(result).splitlines()) == 2 + len(result["rows"])
    show(result)
    assert "skipping against pruning" in capsys.readouterr().out
