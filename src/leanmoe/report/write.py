"""Writes the page of whatever a run's folder holds."""

from __future__ import annotations

from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_text
from leanmoe.plan import Plan
from leanmoe.report.eval_tables import sheets
from leanmoe.report.page import render
from leanmoe.results.bench import BenchResults
from leanmoe.results.eval import EvalResults
from leanmoe.results.predict import SweepResults
from leanmoe.results.study import StudyResults
from leanmoe.results.tune import TuneResults

PAGE = "report.html"
FILES = ("results.json", "study.json")
"""What verbs call their results in a run's folder."""
KINDS = (TuneResults, BenchResults, EvalResults, StudyResults, SweepResults)
Shown = TuneResults | BenchResults | EvalResults | StudyResults | SweepResults


def write_page(folder: Path, target: Path | None = None) -> Path:
    """Writes the page of the run in `folder` to `target` (its report.html); returns where.

    Raises LeanMoeError where the folder holds no results that this version reads.
    """
    target = target or folder / PAGE
    write_text(target, page_of(read_any(folder), folder))
    return target


def read_any(folder: Path) -> Shown:
    """The results in a run's folder, of whichever verb they are.

    Raises LeanMoeError where there are none, or none that this version reads.
    """
    path = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
    value = read_json(path, "results")
    for kind in KINDS:
        if isinstance(value, dict) and kind.KIND in value:
            return kind.from_json(value, str(path))
    raise LeanMoeError(
        f"results {path} are of no verb that has a page: they hold none of "
        f"{', '.join(kind.KIND for kind in KINDS)}"
    )


def page_of(results: Shown, folder: Path) -> str:
    """The page of results as HTML; that of a tune run also shows the plan in its folder.

    Raises LeanMoeError for results that no run writes: a name that no row has, no figure of a run.
    """
    from jinja2 import TemplateError  # only where a page is asked for

    try:
        # Pages with plots need plotly, which comes with leanmoe[tune]; the page of eval has none.
        if isinstance(results, TuneResults):
            from leanmoe.report.tune_page import tune_page

            return tune_page(results, Plan.load(folder / "plan.json"))
        if isinstance(results, BenchResults):
            from leanmoe.report.bench_page import bench_page

            return bench_page(results)
        if isinstance(results, StudyResults):
            from leanmoe.report.study_page import study_page

            return study_page(results)
        if isinstance(results, EvalResults):
            title = f"leanmoe eval: {results.settings['model']}"
            return render("eval.html.j2", title=title, results=results, sheets=sheets(results))
        return render("predict.html.j2", title=f"leanmoe: {results.model}", results=results)
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        TemplateError,
    ) as error:
        reason = f"{folder} do not fit together ({type(error).__name__}: {error})"
        raise LeanMoeError(f"no page shows {results.WHAT}: those in {reason}") from error
