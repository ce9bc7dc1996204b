"""A picture of The results of `measure`: loss against speed at each load, and against memory.

Every criterion is there: the best at each share and the paper's counts by their own colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common.svg import LINE, SOFT, circle, document, line, text, ticks

GROUPS = {
    "skipping, weights kept": "#0b7a75",
    "skipping, as the paper": "#e08e0b",
    "pruning, best criterion": "#b3261e",
    "pruning, the paper's counts": "#8e7cc3",
    "pruning, other criteria": "#b9c2cb",
}
MEMORY = "memory"
"""The panel beside those of the loads."""
WIDTH, HEIGHT, TOP, LEFT, GAP = 250, 260, 70, 60, 50
TITLE = "Increase of next-token loss (%) against the speed of a step, and against memory"
LABEL = "Loss against speed and memory: skipping beside pruning"
MOST_LOSS = 32.0
"""Percent; what loses more stands at the upper edge, hollow."""


Scale = Callable[[float], float]
"""Where a value lies, in pixels."""


@dataclass(frozen=True)
class Point:
    """A setting: speed or memory over the full model's, and loss, each with its interval."""

    name: str
    across: tuple[float, float, float]
    loss: tuple[float, float, float]


def picture(result: dict[str, Any]) -> str:
    """One panel for each load, and one for memory."""
    loads = [*next(row for row in result["rows"] if "speed" in row)["speed"], MEMORY]
    width = LEFT + len(loads) * (WIDTH + GAP)
    height = TOP + HEIGHT + 56
    parts = [text(LEFT, 20, TITLE, weight="600")]
    for number, (name, colour) in enumerate(GROUPS.items()):
        at = LEFT + 200 * number
        parts += [circle(at + 5, 38, colour, colour), text(at + 14, 42, name, SOFT)]
    for number, load in enumerate(loads):
        groups = {name: _points(result, name, load) for name in GROUPS}
        parts += _panel(LEFT + number * (WIDTH + GAP), load, groups)
    return document(width, height, LABEL, parts)


def _points(result: dict[str, Any], group: str, load: str) -> list[Point]:
    rows = [row for row in result["rows"] if "speed" in row and "increase" in row]
    if group.startswith("skipping"):
        rows = [row for row in rows if row["keep"] == "100%"]
        rows = [row for row in rows if ("kept" in row["criterion"]) == ("kept" in group)]
    else:
        rows = [row for row in rows if row["keep"] != "100%"]
        best = _best(rows)
        counts = [row for row in rows if row["criterion"] == "activate-count"]
        if "best" in group:
            rows = best
        elif "counts" in group:
            rows = [row for row in counts if row not in best]
        else:
            rows = [row for row in rows if row not in best and row not in counts]
    full = next(row for row in result["rows"] if row["criterion"] == "full")
    return [
        Point(
            row["criterion"] if row["keep"] == "100%" else f"{row['criterion']}, {row['keep']}",
            _across(row, full, load),
            _triple(row["increase"], "ratio", 100),
        )
        for row in rows
    ]


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each share the row of least loss, of those that are checkpoints."""
    even = [row for row in rows if "uneven" not in row["criterion"]]
    return [
        min((row for row in even if row["keep"] == keep), key=lambda row: row["increase"]["ratio"])
        for keep in dict.fromkeys(row["keep"] for row in even)
    ]


def _across(row: dict[str, Any], full: dict[str, Any], load: str) -> tuple[float, float, float]:
    if load != MEMORY:
        return _triple(row["speed"][load], "median", 1)
    share = row["bytes"] / full["bytes"]
    return share, share, share


def _triple(value: dict[str, float], middle: str, times: float) -> tuple[float, float, float]:
    return times * value[middle], times * value["low"], times * value["high"]


def _panel(left: float, load: str, groups: dict[str, list[Point]]) -> list[str]:
    everyone = [point for points in groups.values() for point in points]
    low = min(1.0, *(point.across[1] for point in everyone))
    high = max(1.05, *(point.across[2] for point in everyone))
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)

    def x(share: float) -> float:
        return left + WIDTH * (share - low) / (high - low)

    def y(loss: float) -> float:
        return TOP + HEIGHT * (1 - (min(loss, MOST_LOSS) + 2) / (MOST_LOSS + 2))

    parts = _axes(left, load, [share for share in ticks(low, high, 7) if share >= low], x, y)
    for name, points in groups.items():
        colour = GROUPS[name]
        for point in points:
            fill = colour if point.loss[0] <= MOST_LOSS else "#ffffff"
            across, up = x(point.across[0]), y(point.loss[0])
            parts.append(line(x(point.across[1]), up, x(point.across[2]), up, colour, 1.2))
            parts.append(line(across, y(point.loss[1]), across, y(point.loss[2]), colour, 1.2))
            title = f"{point.name}: {point.loss[0]:+.1f}%, x{point.across[0]:.2f}"
            parts.append(circle(across, up, fill, colour, title))
    return parts


def _axes(left: float, load: str, shares: list[float], x: Scale, y: Scale) -> list[str]:
    """Title, grid and the numbers beside it."""
    shown = {"1": "1 request decodes", "prompts": "prompts", MEMORY: "memory of all weights"}
    parts = [text(left, TOP - 8, shown.get(load, f"{load} requests decode"), weight="600")]
    for loss in (0, 10, 20, 30):
        parts.append(line(left, y(loss), left + WIDTH, y(loss), LINE if loss else SOFT))
        parts.append(text(left - 6, y(loss) + 4, f"{loss}", SOFT, anchor="end"))
    for share in shares:
        at = x(share)
        parts.append(line(at, TOP, at, TOP + HEIGHT, SOFT if abs(share - 1) < 1e-9 else LINE))
        parts.append(text(at, TOP + HEIGHT + 16, f"{share:.2f}", SOFT, anchor="middle"))
    name = "over the full model's" if load == MEMORY else "speed of a step over the full model's"
    parts.append(text(left + WIDTH / 2, TOP + HEIGHT + 36, name, SOFT, anchor="middle"))
    return parts
