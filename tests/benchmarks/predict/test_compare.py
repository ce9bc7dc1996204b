"""The planner beside what was measured: every committed file can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.predict import compare


def test_every_committed_measurement_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path)])
    compare.main()
    (path,) = tmp_path.glob("*-cost-compare.json")
    found = json.loads(path.read_text())
    assert found["label"] == "modelled, against measured"
    assert all(found[name] for name in ("layers", "steps", "engine steps", "steps by layout"))
    assert "nothing measured is there" not in capsys.readouterr().out
