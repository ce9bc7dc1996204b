"""Writes the page of whatever a run's folder holds."""

from __future__ import annotations

from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import write_text
from leanmoe.core.schema import ResultsFile
from leanmoe.plan import Plan
from leanmoe.report.bench_page import bench_page
from leanmoe.report.eval_page import eval_page
from leanmoe.report.predict_page import predict_page
from leanmoe.report.study_page import study_page
from leanmoe.report.tune_page import tune_page
from leanmoe.report.verdict_svg import verdict_svg
from leanmoe.results.bench import BenchResults
from leanmoe.results.eval import EvalResults
from leanmoe.results.predict import SweepResults
from leanmoe.results.read import read_any
from leanmoe.results.study import StudyResults
from leanmoe.results.tune import TuneResults

PAGE = "report.html"


def write_page(folder: Path, target: Path | None = None) -> Path:
    """Writes the page of the run in `folder` to `target` (its report.html); returns where.

    Raises LeanMoeError where the folder holds no results that this version reads.
    """
    target = target or folder / PAGE
    write_text(target, page_of(read_any(folder), folder))
    return target


def page_of(results: ResultsFile, folder: Path) -> str:
    """The page of results as HTML; that of a tune run also shows the plan in its folder."""
    if isinstance(results, TuneResults):
        return tune_page(results, Plan.load(folder / "plan.json"))
    if isinstance(results, BenchResults):
        return bench_page(results)
    if isinstance(results, EvalResults):
        return eval_page(results)
    if isinstance(results, StudyResults):
        return study_page(results)
    if isinstance(results, SweepResults):
        return predict_page(results)
    raise LeanMoeError(f"{results.WHAT} have no page")


def write_svg(folder: Path, target: Path) -> None:
    """Draws the verdict of the tune run in `folder`.

    Raises LeanMoeError where the folder holds a run of another verb.
    """
    results = read_any(folder)
    if not isinstance(results, TuneResults):
        raise LeanMoeError(
            f"--svg draws the verdict of a tune run: {folder} holds a run of "
            f"{results.KIND.removeprefix('leanmoe_')}"
        )
    write_text(target, verdict_svg(results))
