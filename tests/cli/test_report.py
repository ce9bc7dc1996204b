"""`leanmoe report` on an evaluation: its page again, or one line on why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_main import run
from tests.report.test_eval_tables import content


def saved(folder: Path, version: int) -> None:
    """An evaluation's results in `folder`."""
    whole = {**content(), "leanmoe_eval": version}
    (folder / "results.json").write_text(json.dumps(whole))


def test_the_page_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 1)
    code, out, _ = run(capsys, "report", str(tmp_path), "--json")
    assert (code, json.loads(out)["report"]) == (0, str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "What plans cost: reference" in page
    assert "top_k=6,renormalise=0" in page


def test_results_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 7)
    code, _, err = run(capsys, "report", str(tmp_path))
    assert (code, "schema version 7: this leanmoe reads 1" in err) == (1, True)
