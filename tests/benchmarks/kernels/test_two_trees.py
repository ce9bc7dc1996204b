"""Two checkouts in one interleaved run, tiny: this one beside itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import two_trees

ROOT = Path(__file__).parents[3]


def test_a_checkout_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(two_trees.TOKENS, "cpu", (1,))
    monkeypatch.setattr(two_trees, "RULES", {"full": {}})
    words = ["x", "--before", str(ROOT), "--after", str(ROOT), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path)])
    two_trees.main()
    (path,) = tmp_path.glob("*-two-trees-cpu.json")
    found = json.loads(path.read_text())
    assert found["commits"]["before"] == found["commits"]["after"] != ""
    assert [call["call"] for call in found["calls"]] == [
        "reference T=1 full route", "reference T=1 full experts"
    ]  # fmt: skip
    assert all(call["ratio"] > 0 for call in found["calls"])
