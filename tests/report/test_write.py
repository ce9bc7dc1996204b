"""Every verb's page is written from its folder; the picture is of tune runs alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.report.write import write_page, write_svg
from tests.report import example
from tests.results.committed import committed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(example.results()))
    (tmp_path / "plan.json").write_text(json.dumps(example.plan()))
    return tmp_path


@pytest.mark.parametrize("kind", ["leanmoe_bench", "leanmoe_eval", "leanmoe_study"])
def test_each_verb_has_its_page(tmp_path: Path, kind: str) -> None:
    shutil.copy(committed(kind)[0], tmp_path / "results.json")
    page = write_page(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text().startswith("<!doctype html>")


def test_a_tune_run_has_a_page_and_a_picture(run: Path) -> None:
    page = write_page(run, run / "there.html")
    write_svg(run, run / "verdict.svg")
    assert "leanmoe tune: reference" in page.read_text()
    assert (run / "verdict.svg").read_text().startswith("<svg")


def test_other_runs_have_no_picture(tmp_path: Path) -> None:
    shutil.copy(committed("leanmoe_eval")[0], tmp_path / "results.json")
    with pytest.raises(LeanMoeError, match="holds a run of eval"):
        write_svg(tmp_path, tmp_path / "verdict.svg")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"leanmoe_results": 7}, "schema version 7"), ({"fronts": None}, "fronts is missing")],
)
def test_results_of_another_form_are_refused(
    run: Path, change: dict[str, object], message: str
) -> None:
    results = {k: v for k, v in {**example.results(), **change}.items() if v is not None}
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(LeanMoeError, match=message):
        write_page(run)
