"""The elements of small SVG pictures, for places that show pictures but no pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, SOFT, LINE = "#1d2b3a", "#5c6b7a", "#dfe5ea"
STEPS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def document(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """A whole picture on white; `label` is what a screen reader says."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            'font-family="system-ui, sans-serif" font-size="13" role="img" '
            f'aria-label="{escape(label)}">',
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    """A straight line."""
    return path([(x1, y1), (x2, y2)], colour, width)


def path(points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
    """A line through points."""
    ends = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{ends}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def circle(x: float, y: float, fill: str, edge: str, title: str = "") -> str:
    """A point; `title` is shown where the pointer rests on it."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{edge}">'
        f"<title>{escape(title)}</title></circle>"
    )


def text(
    x: float, y: float, words: str, colour: str = INK, weight: str = "400", anchor: str = "start"
) -> str:
    """Words whose baseline is at `y`; `anchor` is start, middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def ticks(low: float, high: float, most: float) -> list[float]:
    """Round values from `low` to `high`, at most about `most` of them."""
    step = next((each for each in STEPS if (high - low) / each <= most), high - low)
    return [number * step for number in range(int(low / step), int(high / step) + 1)]
