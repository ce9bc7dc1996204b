"""The plots of a bench: throughput, gain and the trade between one user and a whole device."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from leanmoe.report.plots import COLOURS, FULL, figure_with

Bench = dict[str, Any]


def throughput(bench: Bench) -> go.Figure:
    """Output tokens a second over load; small points are the repeats, lines their medians."""
    figure = _over_load(bench, "output tokens a second")
    for number, name in enumerate(names(bench)):
        points = [
            (load_value(entry), run["output_throughput"])
            for entry in bench["loads"]
            for run in entry["runs"].get(name, [])
        ]
        figure.add_trace(_repeats(points, number))
        figure.add_trace(
            _line(
                [load_value(entry) for entry in bench["loads"]],
                [_median(entry, name, "output_throughput") for entry in bench["loads"]],
                name,
                number,
                f"{name}<br>%{{x}}: %{{y:,.4g}} tok/s<extra></extra>",
            )
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def gain(bench: Bench) -> go.Figure:
    """Each variant over the first, paired by repeat, with intervals, over load."""
    figures = gained(bench)
    title = "output throughput" if figures == "output_throughput" else "time per output token"
    figure = _over_load(bench, f"{title}, over {names(bench)[0]}")
    figure.add_hline(y=0, line={"color": FULL, "width": 1.5})
    for number, name in enumerate(names(bench)[1:], 1):
        entries = [e for e in bench["loads"] if e["gain"].get(name, {}).get(figures)]
        ratios = [entry["gain"][name][figures] for entry in entries]
        trace = _line(
            [load_value(entry) for entry in entries],
            [100 * (ratio["median"] - 1) for ratio in ratios],
            name,
            number,
            f"{name}<br>%{{x}}: %{{y:+.1f}}%<extra></extra>",
        )
        trace.error_y = {
            "type": "data",
            "symmetric": False,
            "array": [100 * (ratio["high"] - ratio["median"]) for ratio in ratios],
            "arrayminus": [100 * (ratio["median"] - ratio["low"]) for ratio in ratios],
            "thickness": 1.5,
            "color": COLOURS[number - 1],
        }
        figure.add_trace(trace)
    figure.update_yaxes(ticksuffix="%")
    figure.update_layout(showlegend=True)
    return figure


def user_against_device(bench: Bench) -> go.Figure:
    """Tokens a second that one user sees against those that one device makes; one point a load.

    Up and to the right is better. A user's rate is 1 / median TPOT.
    """
    device = bench["devices"]
    figure = figure_with("tok/s/user (1 / median TPOT)", f"tok/s/{device['kind']} (output)")
    for number, name in enumerate(names(bench)):
        entries = [e for e in bench["loads"] if _median(e, name, "median_tpot_ms")]
        trace = _line(
            [1e3 / float(_median(e, name, "median_tpot_ms") or 1) for e in entries],
            [float(_median(e, name, "output_throughput") or 0) / device["count"] for e in entries],
            name,
            number,
            f"{name}, %{{text}}<br>%{{x:.4g}} tok/s/user, %{{y:,.4g}} tok/s<extra></extra>",
        )
        trace.text = [f"{load_value(e):g}" for e in entries]
        trace.mode = "lines+markers+text" if number == 0 else "lines+markers"
        trace.textposition = "bottom left"
        figure.add_trace(trace)
    figure.update_yaxes(rangemode="tozero")
    return figure


def gained(bench: Bench) -> str:
    """What a gain is in: throughput, or TPOT in an open loop, whose rate sets the throughput."""
    is_open = any(entry["request_rate"] is not None for entry in bench["loads"])
    return "median_tpot_ms" if is_open else "output_throughput"


def names(bench: Bench) -> list[str]:
    """The variants' names; the first is what the others are compared with."""
    return [str(variant["name"]) for variant in bench["variants"]]


def load_value(entry: dict[str, Any]) -> float:
    """The load's number: requests at once, or a second."""
    rate = entry["request_rate"]
    return float(entry["max_concurrency"] if rate is None else rate)


def _median(entry: dict[str, Any], name: str, figure: str) -> float | None:
    value = entry["median"].get(name, {}).get(figure)
    return None if value is None else float(value)


def _over_load(bench: Bench, title: str) -> go.Figure:
    is_open = gained(bench) != "output_throughput"
    figure = figure_with("requests a second" if is_open else "requests at once", title)
    loads = [load_value(entry) for entry in bench["loads"]]
    figure.update_xaxes(type="log", tickvals=loads, ticktext=[f"{load:g}" for load in loads])
    return figure


def _colour(number: int) -> str:
    return FULL if number == 0 else COLOURS[(number - 1) % len(COLOURS)]


def _line(
    x: list[float], y: list[float | None] | list[float], name: str, number: int, hover: str
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line={"color": _colour(number), "width": 2.5 if number else 2},
        marker={"size": 8},
        hovertemplate=hover,
    )


def _repeats(points: list[tuple[float, float]], number: int) -> go.Scatter:
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        marker={"color": _colour(number), "size": 4, "opacity": 0.45},
    )
