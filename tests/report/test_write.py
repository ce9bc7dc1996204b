"""Every verb's page is written from its folder, told apart by the key of its schema version."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import StoredFile
from leanmoe.report.write import page_of, read_any, write_page
from leanmoe.results.bench import BenchResults
from leanmoe.results.eval import EvalResults
from leanmoe.results.study import StudyResults
from leanmoe.results.tune import TuneResults
from tests.report import example
from tests.results.committed import committed
from tests.results.test_predict import SWEEP

HERE = Path()
EVALUATIONS = committed("leanmoe_eval")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(example.results()))
    (tmp_path / "plan.json").write_text(json.dumps(example.plan()))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TuneResults, "results.json"),
        (BenchResults, "results.json"),
        (EvalResults, "results.json"),
        (StudyResults, "study.json"),
    ],
)
def test_each_verbs_results_are_found(tmp_path: Path, kind: type[StoredFile], name: str) -> None:
    shutil.copy(committed(kind.KIND)[0], tmp_path / name)
    assert type(read_any(tmp_path)) is kind


def test_what_is_of_no_verb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"leanmoe_profile": 1}))
    with pytest.raises(LeanMoeError, match="they hold none of leanmoe_results, leanmoe_bench"):
        read_any(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"results\.json"):
        read_any(tmp_path)


@pytest.mark.parametrize("kind", ["leanmoe_bench", "leanmoe_eval", "leanmoe_study"])
def test_each_verb_has_its_page(tmp_path: Path, kind: str) -> None:
    shutil.copy(committed(kind)[0], tmp_path / "results.json")
    page = write_page(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text().startswith("<!doctype html>")


def test_a_tune_run_has_a_page(run: Path) -> None:
    page = write_page(run, run / "there.html")
    assert "leanmoe tune: reference" in page.read_text()


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


def no_name(value: Any) -> None:
    value["model"] = {}


def no_figure(value: Any) -> None:
    for runs in value["loads"][0]["runs"].values():
        runs[0].pop("output_throughput")


def list_of_limits(value: Any) -> None:
    value["settings"]["goodput"] = [1]


def odd_confidence(value: Any) -> None:
    value["settings"]["confidence"] = {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_name, "no page shows results of bench: .* do not fit together .*name"),
        (no_figure, "do not fit together .*output_throughput"),
        (list_of_limits, r"do not fit together \(AttributeError: "),
        (odd_confidence, r"do not fit together \(TypeError: float"),
    ],
)
def test_results_that_do_not_fit_together_are_refused(
    tmp_path: Path, damage: Callable[[Any], None], message: str
) -> None:
    value = json.loads(committed("leanmoe_bench")[0].read_text())
    damage(value)
    (tmp_path / "results.json").write_text(json.dumps(value))
    with pytest.raises(LeanMoeError, match=message):
        write_page(tmp_path)


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.name)
def test_a_committed_evaluation_has_a_page_without_script(path: Path) -> None:
    results = EvalResults.load(path)
    html = page_of(results, HERE)
    assert "<h1>What plans cost: reference</h1>" in html
    assert "<script" not in html
    assert results.plans or results.transfer
    assert all(plan.name in html for plan in results.plans)
    kinds = results.transfer.rows[0].kinds if results.transfer else ()
    assert all(f"1, {each.kind}" in html for each in kinds)


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.name)
def test_the_confidence_shown_is_the_one_asked_for(path: Path) -> None:
    results = EvalResults.load(path)
    html = page_of(replace(results, settings={**results.settings, "confidence": 0.8}), HERE)
    if results.transfer is None:
        assert "[80%]" in html
        assert "[95%]" not in html
        return
    # A finished plan is tested as its run was: at that run's confidence.
    moved = replace(results.transfer, confidence=0.9)
    assert "Bounds are 95% each" in html
    assert "Bounds are 90% each" in page_of(replace(results, transfer=moved), HERE)


def test_an_evaluations_page_needs_no_plotly() -> None:
    code = (
        "import sys; sys.modules['plotly'] = None\nfrom pathlib import Path\n"
        "from leanmoe.report.write import page_of\nfrom leanmoe.results.eval import EvalResults\n"
        f"print(len(page_of(EvalResults.load(Path({str(EVALUATIONS[0])!r})), Path())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_sweeps_page_shows_every_section() -> None:
    html = re.sub(r"<script.*?</script>", "", page_of(SWEEP, HERE), flags=re.S)
    assert "leanmoe predict: a &lt;model&gt; on h200" in html
    assert "1,000 configurations" in html
    assert "TPOT at most 30 ms. GPUs saved are at equal load." in html
    assert "8 GPUs, TP4 EP8 DP2" in html
    assert "none meets the limits" in html
    assert "the weights do not fit" in html
    assert "Every split fitted." in page_of(replace(SWEEP, refused={}), HERE)
