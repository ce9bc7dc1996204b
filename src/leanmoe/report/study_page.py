"""The page of `leanmoe study`: claims, analysis, throughput, quality."""

from __future__ import annotations

from leanmoe.report.page import render
from leanmoe.results.study import StudyResults, Table9

GROUPS = {
    "k": "Experts a token",
    "k, weights kept": "Experts a token, those that remain keep their weights",
    "shape": "The paper's skipping shapes",
    "pruning": "Experts in total, by criterion",
    "both": "Both",
}
"""What the groups of measured settings are called."""


def study_page(results: StudyResults) -> str:
    """The whole page as HTML."""
    return render(
        "study.html.j2",
        title="leanmoe study",
        results=results,
        groups=GROUPS,
        fitted=_fitted(results.table_9),
    )


def _fitted(nine: Table9) -> str:
    beyond = ", ".join(f"k = {cell.k} at {cell.concurrency}" for cell in nine.out_of_reach)
    breaks = ", ".join(
        f"k = {cell.k} at {cell.concurrency} ({cell.points or 0:+.1f} points)"
        for cell in nine.trend_breaks
    )
    return (
        "One number is fitted, to the cited k = 8 column alone: "
        f"{nine.step_overhead_ms:.2f} ms of an engine's own in every step. "
        f"With it k = 8 is off by at most {100 * nine.full_off:.0f}%. "
        f"{nine.within} of {nine.counted} gains of k = 6 and 4 are within 3 points of the "
        "cited ones. Points marked * break the cited table's own trend and are not counted; by its "
        f"second differences these do: {breaks or 'none'}. Out of reach of every model with "
        "independent tokens, since reading fewer experts at the memory's stated rate alone gains "
        f"over 3 points more than cited: {beyond or 'none'}. "
        f"Experts: {nine.stands_on}."
    )
