"""The page of an evaluation: every table, and how it was measured."""

from __future__ import annotations

from leanmoe.report.eval_tables import sheets
from leanmoe.report.page import render
from leanmoe.results.eval import EvalResults


def eval_page(results: EvalResults) -> str:
    """The page as HTML; it needs no script and no network."""
    title = f"leanmoe eval: {results.settings['model']}"
    return render("eval.html.j2", title=title, results=results, sheets=sheets(results))
