"""The page of a sweep: fronts of tokens a user against a GPU's, and the cheapest deployment."""

from __future__ import annotations

from leanmoe.report.page import render
from leanmoe.results.predict import SweepResults


def predict_page(results: SweepResults) -> str:
    """The page of `leanmoe predict --sweep --json`'s results."""
    return render("predict.html.j2", title=f"leanmoe: {results.model}", results=results)
