"""The page of a sweep: fronts of tokens a user against a GPU's, and the cheapest deployment."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from leanmoe.core.files import write_text
from leanmoe.report.page import document, number_cell, plot, section, table_with
from leanmoe.report.plots import COLOURS, FULL, figure_with


def write_sweep_page(results: dict[str, Any], target: Path) -> None:
    """Writes the page of `leanmoe predict --sweep --json`'s results."""
    body = "".join(
        [
            f"<h1>leanmoe predict: {escape(results['model'])} on {escape(results['gpu'])}</h1>"
            f'<p class="lead">{results["configurations"]:,} configurations, '
            f"{escape(results['load'])}.</p>",
            section(
                "Tokens a second, of a user and of a GPU",
                "modelled",
                f"No other configuration is better in both. {results['how'].capitalize()}.",
                plot(front_figure(results)),
            ),
            section(
                "The cheapest deployment within the limits",
                "modelled",
                _limits(results),
                table_with(*_cheapest(results), words={1}),
            ),
            section("What did not fit", "", "", _refused(results)),
        ]
    )
    write_text(target, document(f"leanmoe: {results['model']}", body))


def front_figure(results: dict[str, Any]) -> go.Figure:
    """The Pareto front of each plan."""
    figure = figure_with("output tok/s of a user", "output tok/s of a GPU")
    colours = (FULL, *COLOURS)
    for number, (name, points) in enumerate(results["fronts"].items()):
        figure.add_trace(
            go.Scatter(
                x=[p["per_user"] for p in points],
                y=[p["per_gpu"] for p in points],
                mode="lines+markers",
                name=name,
                line_color=colours[number % len(colours)],
                hovertext=[f"{place(p)}, {p['concurrency']} at once" for p in points],
            )
        )
    figure.update_yaxes(type="log")
    return figure


def place(point: dict[str, Any]) -> str:
    """A deployment in few letters."""
    parts = {"TP": "tensor", "EP": "expert", "DP": "data", "PP": "pipeline"}
    named = [f"{k}{point[v]}" for k, v in parts.items() if point[v] > 1 or k == "TP"]
    return f"{point['gpus']} GPUs, {' '.join(named)}"


def _limits(results: dict[str, Any]) -> str:
    limits = results["limits"]
    words = []
    if limits["tpot_ms"] is not None:
        words.append(f"TPOT at most {limits['tpot_ms']:g} ms")
    if limits["ttft_ms"] is not None:
        words.append(f"TTFT at most {limits['ttft_ms']:g} ms")
    return (", ".join(words) or "No limit was set") + ". GPUs saved are at equal load."


def _cheapest(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = ["plan", "deployment", "at once", "tok/s a GPU", "TPOT ms", "TTFT ms"]
    names += ["cost a million", "GPUs", "GPUs saved"]
    rows = []
    for row in results["cheapest"]:
        point = row["point"]
        if point is None:
            rows.append([escape(row["plan"]), "none meets the limits", *[""] * 7])
            continue
        figures = [point["per_gpu"], point["tpot_ms"], point["ttft_ms"], row.get("cost_a_million")]
        rows.append(
            [
                escape(row["plan"]),
                escape(place(point)),
                str(point["concurrency"]),
                *[number_cell(value) for value in figures],
                str(row.get("gpus", "")),
                str(row.get("gpus_saved", "")),
            ]
        )
    return names, rows


def _refused(results: dict[str, Any]) -> str:
    if not results["refused"]:
        return "<p>Every split fitted.</p>"
    rows = [[escape(place_), escape(why)] for place_, why in results["refused"].items()]
    return table_with(["deployment", "why"], rows, words={1})
