"""A picture of The results of `measure`: loss against speed at each load, and against memory.

Every criterion is there: the best at each share and the paper's counts by their own colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

INK, SOFT, LINE = "#1d2b3a", "#5c6b7a", "#dfe5ea"
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
MOST_LOSS = 32.0
"""Percent; what loses more stands at the upper edge, hollow."""


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
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" '
        'aria-label="Loss against speed and memory: skipping beside pruning">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 20, TITLE, INK, weight="600"),
    ]
    for number, (name, colour) in enumerate(GROUPS.items()):
        at = LEFT + 200 * number
        parts.append(f'<circle cx="{at + 5}" cy="38" r="4" fill="{colour}"/>')
        parts.append(_text(at + 14, 42, name, SOFT))
    for number, load in enumerate(loads):
        groups = {name: _points(result, name, load) for name in GROUPS}
        parts += _panel(LEFT + number * (WIDTH + GAP), load, groups)
    return "\n".join([*parts, "</svg>"]) + "\n"


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

    def x(speed: float) -> float:
        return left + WIDTH * (speed - low) / (high - low)

    def y(loss: float) -> float:
        return TOP + HEIGHT * (1 - (min(loss, MOST_LOSS) + 2) / (MOST_LOSS + 2))

    shown = {"1": "1 request decodes", "prompts": "prompts", MEMORY: "memory of all weights"}
    title = shown.get(load, f"{load} requests decode")
    parts = [_text(left, TOP - 8, title, INK, weight="600")]
    for loss in (0, 10, 20, 30):
        parts.append(_line(left, y(loss), left + WIDTH, y(loss), SOFT if loss == 0 else LINE))
        parts.append(_text(left - 6, y(loss) + 4, f"{loss}", SOFT, at="end"))
    step = 0.05 if high - low < 0.4 else 0.1 if high - low < 0.8 else 0.2
    number = round(low / step + 0.5)
    while number * step <= high:
        at = x(number * step)
        parts.append(_line(at, TOP, at, TOP + HEIGHT, SOFT if number * step == 1 else LINE))
        parts.append(_text(at, TOP + HEIGHT + 16, f"{number * step:.2f}", SOFT, at="middle"))
        number += 1
    parts.append(
        _text(
            left + WIDTH / 2,
            TOP + HEIGHT + 36,
            "over the full model's" if load == MEMORY else "speed of a step over the full model's",
            SOFT,
            at="middle",
        )
    )
    for name, points in groups.items():
        colour = GROUPS[name]
        for point in points:
            fill = colour if point.loss[0] <= MOST_LOSS else "#ffffff"
            across, up = x(point.across[0]), y(point.loss[0])
            parts.append(_line(x(point.across[1]), up, x(point.across[2]), up, colour))
            parts.append(_line(across, y(point.loss[1]), across, y(point.loss[2]), colour))
            title = escape(f"{point.name}: {point.loss[0]:+.1f}%, x{point.across[0]:.2f}")
            parts.append(
                f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" fill="{fill}" stroke="{colour}">'
                f"<title>{title}</title></circle>"
            )
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="1.2"/>'


def _text(
    x: float, y: float, words: str, colour: str, at: str = "start", weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{at}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )
