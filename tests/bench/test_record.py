"""The record of a bench: whole after every run, and what was measured is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.bench.one_block import block
from leanmoe.bench.record import Record
from leanmoe.bench.settings import BenchSettings
from leanmoe.core.errors import LeanMoeError
from tests.bench.test_sweep import SETTINGS, Fake, run


def test_what_was_measured_stays_and_says_why_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(LeanMoeError, match="stopped answering"):
        run(Fake(breaks_at=12), path)
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert found["stopped"] == "the server stopped answering"
    assert len(found["loads"]) == 2
    assert len(found["loads"][0]["runs"]["full"]) == 3
    assert sum(len(runs) for runs in found["loads"][1]["runs"].values()) == 2


def test_a_killed_bench_left_a_file_that_says_so(tmp_path: Path) -> None:
    record = Record(tmp_path / "results.json", SETTINGS, [{"name": "full"}], {})
    record.save()
    stored = json.loads(record.path.read_text())
    assert stored["complete"] is False
    assert "killed" in stored["stopped"]


def test_one_repeat_claims_no_gain(tmp_path: Path) -> None:
    settings = BenchSettings(**{**vars(SETTINGS), "repeats": 1})
    found = run(Fake(), tmp_path / "results.json", settings)
    assert found["loads"][0]["gain"] == {}
    assert "no gain is claimed" in block(found["loads"][0], 0.95)
