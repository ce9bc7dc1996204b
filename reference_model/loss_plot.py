"""The loss curve as a small SVG, drawn from the summarised training log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The drawing's size and margins, in pixels."""

    width: int = 720
    height: int = 340
    left: int = 56
    right: int = 16
    top: int = 16
    bottom: int = 44
    train_colour: str = "#3a6ea5"
    dev_colour: str = "#c2542d"


def loss_svg(train: Sequence[Point], dev: Sequence[Point], frame: Frame = Frame()) -> str:
    """Loss in nats per token over billions of tokens; `train` and `dev` are (tokens, loss)."""
    low = min(loss for _, loss in [*train, *dev])
    # The first moments fall from ln(vocabulary) and would flatten everything after them.
    high = sorted(loss for _, loss in train)[int(0.98 * (len(train) - 1))]
    last = max(tokens for tokens, _ in [*train, *dev])
    y_low, y_high = low - 0.05, high + 0.05

    def x(tokens: float) -> float:
        return frame.left + (frame.width - frame.left - frame.right) * tokens / last

    def y(loss: float) -> float:
        part = (min(loss, y_high) - y_low) / (y_high - y_low)
        return frame.height - frame.bottom - (frame.height - frame.top - frame.bottom) * part

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {frame.height}" '
        'font-family="sans-serif" font-size="12" role="img" '
        'aria-label="Training and dev loss over tokens">',
        f'<rect width="{frame.width}" height="{frame.height}" fill="#ffffff"/>',
        *_grid(frame, x, y, last, (y_low, y_high)),
        _line(train, x, y, frame.train_colour, 1.0),
        _line(dev, x, y, frame.dev_colour, 2.0),
        _label(frame.width - 250, 34, "training (mean of each span)", frame.train_colour),
        _label(frame.width - 250, 52, "held-out dev slice", frame.dev_colour),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(
    frame: Frame,
    x: Callable[[float], float],
    y: Callable[[float], float],
    last: float,
    bounds: tuple[float, float],
) -> list[str]:
    parts: list[str] = []
    base, end = frame.height - frame.bottom, frame.width - frame.right
    for step in range(int(bounds[0] / 0.25) + 1, int(bounds[1] / 0.25) + 1):
        at = y(step * 0.25)
        parts.append(f'<path d="M{frame.left} {at:.1f}H{end}" stroke="#e4e4e4"/>')
        parts.append(_label(frame.left - 40, at + 4, f"{step * 0.25:.2f}", "#555555"))
    spacing = next((s for s in (1e5, 1e6, 1e7, 1e8, 5e8) if last / s <= 8), 1e9)
    for mark in range(int(last / spacing) + 1):
        name = f"{mark * spacing / 1e6:g}M"
        parts.append(_label(x(mark * spacing) - 12, base + 18, name, "#555555"))
    parts.append(f'<path d="M{frame.left} {base}H{end}" stroke="#888888"/>')
    parts.append(_label(frame.left, frame.height - 8, "tokens", "#333333"))
    parts.append(_label(frame.left + 8, frame.top + 8, "loss, nats per token", "#333333"))
    return parts


def _line(
    points: Sequence[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
    colour: str,
    width: float,
) -> str:
    path = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _label(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{text}</text>'
