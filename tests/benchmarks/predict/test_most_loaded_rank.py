"""Counts of the most loaded rank, tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.predict import most_loaded_rank


def test_a_tiny_count_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["x", "--tokens", "8", "--ranks", "2", "--steps", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    most_loaded_rank.main()
    (path,) = tmp_path.glob("*-most-loaded-rank.json")
    rows = {(r["routing"], r["rule"]): r for r in json.loads(path.read_text())["rows"]}
    assert len(rows) == 8
    full, shared = rows["skewed", "k=8"], rows["skewed", "guaranteed=3"]
    assert full["mass"] == pytest.approx(1.0)
    assert shared["most_loaded"] < full["most_loaded"]
    assert shared["mass"] < 1
