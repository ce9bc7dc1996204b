"""Results files are named alike, and say what made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.common.results import RESULTS, collect, command, file_of, parser_of, write
from leanmoe.core.provenance import Provenance

MADE = Provenance("2026-11-30T12:00:00+00:00", "NVIDIA H200 (SXM)", 4, {}, "abc", 0, "python -m x")


def test_a_file_is_named_by_date_hardware_and_commit(tmp_path: Path) -> None:
    assert file_of(tmp_path, "x", MADE).name == "2026-11-30-nvidia-h200-sxm-abc-x.json"
    assert file_of(tmp_path, "x", MADE, "2x-").name == "2026-11-30-2x-nvidia-h200-sxm-abc-x.json"


def test_a_file_holds_label_and_provenance(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "x.json", MADE, "measured", {"rows": [1]})
    found = json.loads(path.read_text())
    assert found == {"label": "measured", "provenance": MADE.to_json(), "rows": [1]}


def test_results_go_where_out_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert parser_of("Does it?").parse_args([]).output == RESULTS
    monkeypatch.setenv("OUT", str(tmp_path))
    assert parser_of("Does it?").parse_args([]).output == tmp_path


def test_the_command_names_the_module_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = type(sys)("benchmarks.x")
    spec.__spec__ = type("Spec", (), {"name": "benchmarks.x"})()
    monkeypatch.setitem(sys.modules, "__main__", spec)
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "1"])
    assert command() == "python -m benchmarks.x --seed 1"
    assert collect(seed=3).command == command()
