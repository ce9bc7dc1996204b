"""A tune run's verdict as a small SVG: for a README, a slide."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.report.page import sure
from leanmoe.report.svg import INK, LIMIT, LINE, OURS, SOFT, bar, document, line, text, ticks
from leanmoe.results.tune import LoadGain, LoadVerdict, TuneResults

WIDTH, TOP, ROW = 720, 64, 44
TICK_WIDTH = 55
"""The least room between two ticks, in pixels."""


@dataclass(frozen=True)
class Mark:
    """A value and its interval, in percent."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.{1 if abs(self.high) >= 1 else 2}f}%"


@dataclass(frozen=True)
class Panel:
    """Where one of the two drawings is, in pixels, and what it spans, in percent."""

    left: float
    width: float
    low: float
    high: float
    labels_from: float = 0.0
    """Values are written to the right of this, whatever they are."""

    def x(self, percent: float) -> float:
        """The place of a value."""
        return self.left + self.width * (percent - self.low) / (self.high - self.low)


def verdict_svg(results: TuneResults) -> str:
    """Throughput over the full model's, and next-token loss over it, at each concurrency."""
    names = [f"concurrency {gain.concurrency}" for gain in results.gain]
    gains = [_gain(gain) for gain in results.gain]
    losses = [_loss(verdict) for verdict in results.verdicts]
    margin = 100 * results.margin
    shown = [mark for mark in losses if mark]
    left = Panel(
        118,
        320,
        1.1 * min(0.0, *(mark.low for mark in gains)),
        1.1 * max(1.0, *(mark.high for mark in gains)),
    )
    right = Panel(
        502,
        206,
        min([0.0, *(mark.low for mark in shown)]),
        1.5 * max([margin, *(mark.high for mark in shown)]),
        margin,
    )
    base = TOP + ROW * len(gains)
    confidence = sure(results.confidence)
    parts = [
        text(118, 26, "Output throughput over the full model's", weight="600"),
        text(502, 26, "Next-token loss over it", weight="600"),
        text(118, 44, f"median of interleaved repeats, {confidence} interval", SOFT),
        text(502, 44, f"held-out documents, {confidence}", SOFT),
    ]
    for panel, marks in ((left, gains), (right, losses)):
        parts += _axis(panel, base)
        for row, mark in enumerate(marks):
            parts += _row(panel, _middle(row), mark)
    parts += [text(12, _middle(row) + 4, name) for row, name in enumerate(names)]
    limit = right.x(margin)
    parts.append(line(limit, TOP, limit, base, LIMIT))
    parts.append(text(limit, base + 34, "margin", LIMIT, anchor="middle"))
    words = ", ".join(f"{name} {mark}" for name, mark in zip(names, gains, strict=True))
    return document(WIDTH, base + 44, f"Throughput gain: {words}", parts)


def _gain(gain: LoadGain) -> Mark:
    ratio = gain.ratio
    return Mark(*(100 * (each - 1) for each in (ratio.median, ratio.low, ratio.high)))


def _loss(verdict: LoadVerdict) -> Mark | None:
    loss = verdict.loss
    if loss is None:
        return None
    return Mark(100 * loss.ratio, 100 * loss.low, 100 * loss.upper_bound)


def _middle(row: int) -> float:
    return TOP + ROW * (row + 0.5)


def _axis(panel: Panel, base: float) -> list[str]:
    parts = []
    for value in ticks(panel.low, panel.high, panel.width / TICK_WIDTH):
        x = panel.x(value)
        parts.append(line(x, TOP, x, base, LINE if value else SOFT))
        words = f"{value:+g}%" if value else "0"
        parts.append(text(x, base + 18, words, SOFT, anchor="middle"))
    return parts


def _row(panel: Panel, y: float, mark: Mark | None) -> list[str]:
    if mark is None:
        return [text(panel.x(0) + 6, y + 4, "no plan within the margin", SOFT)]
    return [
        bar(panel.x(0), panel.x(mark.value), y, OURS),
        line(panel.x(mark.low), y, panel.x(mark.high), y, INK, 2),
        text(panel.x(max(mark.high, panel.labels_from)) + 6, y + 4, str(mark)),
    ]
