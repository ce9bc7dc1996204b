"""What a table of rules costs, measured once and tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import rule_tables


def test_a_rule_beside_itself_as_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rule_tables.TOKENS, "cpu", (3,))
    monkeypatch.setitem(rule_tables.EXPERTS, "cpu", (32,))
    monkeypatch.setattr(rule_tables, "CALLS", 2)
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "3", "--output", str(tmp_path)])
    rule_tables.main()
    (path,) = tmp_path.glob("*-rule-tables-cpu.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["rule"] for row in rows] == list(rule_tables.RULES)
    for row in rows:
        assert row["constant_us"] > 0
        assert row["middle_half_us"][0] <= row["more_us"] <= row["middle_half_us"][1]
