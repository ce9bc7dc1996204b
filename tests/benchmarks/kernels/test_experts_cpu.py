"""Experts of one layer on a CPU, tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import experts_cpu


def test_a_tiny_run_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["x", "--tokens", "2", "--rounds", "3", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    experts_cpu.main()
    (path,) = tmp_path.glob("*-experts-cpu.json")
    found = json.loads(path.read_text())
    assert [line["dtype"] for line in found["lines"]] == ["float32", "bfloat16"]
    for line in found["lines"]:
        assert {"leanmoe", "eager", "grouped_mm"} <= set(line["microseconds"])
        assert 8 <= line["distinct"] <= 16
