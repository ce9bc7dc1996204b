"""A run's verdict as a small SVG for places that show pictures but no pages: a README, a slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from leanmoe.results.tune import Results

INK, SOFT, LINE, PLAN, MARGIN = "#1d2b3a", "#5c6b7a", "#dfe5ea", "#0b7a75", "#b3261e"


@dataclass(frozen=True)
class Mark:
    """One load: a value and its interval, in percent; None where nothing was tried."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """Where one of the two drawings is, in pixels, and what it spans, in percent."""

    left: float
    width: float
    low: float
    high: float
    labels_from: float = 0.0
    """Values are written to the right of this, whatever they are."""
    top: float = 64
    row: float = 44

    def x(self, percent: float) -> float:
        """The place of a value."""
        return self.left + self.width * (percent - self.low) / (self.high - self.low)

    def y(self, row: int) -> float:
        """The middle of a row."""
        return self.top + self.row * (row + 0.5)


def verdict_svg(results: Results) -> str:
    """Throughput over the full model's, and next-token loss over it, at each load."""
    gains = [_gain(entry) for entry in results["gain"]]
    losses = [_loss(verdict) for verdict in results["verdicts"]]
    margin = 100 * results["settings"]["margin"]
    low = min(0.0, *(mark.low for mark in gains))
    left = Panel(118, 320, 1.1 * low, 1.1 * max(1.0, *(mark.high for mark in gains)))
    seen = [mark.high for mark in losses if mark] + [margin]
    right = Panel(502, 206, min(0.0, *(m.low for m in losses if m), 0.0), 1.5 * max(seen), margin)
    height = left.top + left.row * len(gains) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height:.0f}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" '
        f'aria-label="{escape(_words(gains))}">',
        f'<rect width="720" height="{height:.0f}" fill="#ffffff"/>',
        _text(118, 26, "Output throughput over the full model's", INK, "600"),
        _text(502, 26, "Next-token loss over it", INK, "600"),
        _text(118, 44, "median and interval of interleaved repeats", SOFT),
        _text(502, 44, "held-out documents, interval", SOFT),
    ]
    for panel, marks in ((left, gains), (right, losses)):
        parts += _axis(panel, len(gains))
        for row, mark in enumerate(marks):
            parts += _row(panel, row, mark)
    for row, mark in enumerate(gains):
        parts.append(_text(12, left.y(row) + 4, mark.name, INK))
    limit, base = right.x(margin), _base(right, len(gains))
    parts.append(_line(limit, right.top, limit, base, MARGIN))
    parts.append(_text(limit, base + 34, "margin", MARGIN, at="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _gain(entry: dict[str, Any]) -> Mark:
    ratio = entry["ratio"]
    value, low, high = (100 * (ratio[name] - 1) for name in ("median", "low", "high"))
    return Mark(f"{entry['concurrency']} at once", value, low, high)


def _loss(verdict: dict[str, Any]) -> Mark | None:
    loss = verdict["loss"]
    if loss is None:
        return None
    return Mark("", 100 * loss["ratio"], 100 * loss["low"], 100 * loss["upper_bound"])


def _words(gains: Sequence[Mark]) -> str:
    return "Throughput gain: " + ", ".join(f"{m.name} {m.value:+.1f}%" for m in gains)


def _base(panel: Panel, rows: int) -> float:
    return panel.top + panel.row * rows


def _axis(panel: Panel, rows: int) -> list[str]:
    span = panel.high - panel.low
    step = next(
        s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 1e9) if span / s <= panel.width / 55
    )
    parts, base = [], _base(panel, rows)
    for number in range(int(panel.low / step), int(panel.high / step) + 1):
        at = panel.x(number * step)
        parts.append(_line(at, panel.top, at, base, SOFT if number == 0 else LINE))
        parts.append(
            _text(at, base + 18, f"{number * step:+g}%" if number else "0", SOFT, at="middle")
        )
    return parts


def _row(panel: Panel, row: int, mark: Mark | None) -> list[str]:
    y = panel.y(row)
    if mark is None:
        return [_text(panel.x(0) + 6, y + 4, "no plan within the margin", SOFT)]
    start, end = sorted((panel.x(0), panel.x(mark.value)))
    return [
        f'<rect x="{start:.1f}" y="{y - 9:.1f}" width="{end - start:.1f}" height="18" '
        f'fill="{PLAN}" opacity="0.75"/>',
        _line(panel.x(mark.low), y, panel.x(mark.high), y, INK, 2),
        _text(
            panel.x(max(mark.high, panel.labels_from)) + 6,
            y + 4,
            f"{mark.value:+.{_digits(mark)}f}%",
            INK,
        ),
    ]


def _digits(mark: Mark) -> int:
    return 1 if abs(mark.high) >= 1 else 2


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'
    )


def _text(
    x: float, y: float, words: str, colour: str, weight: str = "400", at: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="{at}">{escape(words)}</text>'
    )
