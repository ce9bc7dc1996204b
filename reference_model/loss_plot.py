"""The loss curve as a small SVG, drawn from the summarised training log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.common.svg import LINE, SOFT, document, line, path, text, ticks

Point = tuple[float, float]
WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 56, WIDTH - 16, 16, HEIGHT - 44
"""The edges of the curve's area, in pixels."""
TRAIN, DEV = "#3a6ea5", "#c2542d"


def loss_svg(train: Sequence[Point], dev: Sequence[Point]) -> str:
    """Loss in nats per token over millions of tokens; `train` and `dev` are (tokens, loss)."""
    low = min(loss for _, loss in [*train, *dev]) - 0.05
    # The first moments fall from ln(vocabulary) and would flatten everything after them.
    high = sorted(loss for _, loss in train)[int(0.98 * (len(train) - 1))] + 0.05
    last = max(tokens for tokens, _ in [*train, *dev])

    def place(point: Point) -> Point:
        share = (min(point[1], high) - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * point[0] / last, BOTTOM - (BOTTOM - TOP) * share

    parts = [
        *_grid(place, last, (low, high)),
        path([place(point) for point in train], TRAIN),
        path([place(point) for point in dev], DEV, 2),
        text(WIDTH - 250, 34, "training (mean of each span)", TRAIN),
        text(WIDTH - 250, 52, "held-out dev slice", DEV),
    ]
    return document(WIDTH, HEIGHT, "Training and dev loss over tokens", parts)


def _grid(place: Callable[[Point], Point], last: float, bounds: tuple[float, float]) -> list[str]:
    parts: list[str] = []
    for loss in ticks(*bounds, most=8):
        if loss > bounds[0]:
            _, y = place((0, loss))
            parts += [
                line(LEFT, y, RIGHT, y, LINE),
                text(LEFT - 6, y + 4, f"{loss:.1f}", anchor="end"),
            ]
    millions = (
        ticks(0, last / 1e6, 8) if last <= 4e8 else [5e2 * n for n in range(int(last / 5e8) + 1)]
    )
    for tokens in millions:
        x, _ = place((1e6 * tokens, bounds[0]))
        parts.append(text(x, BOTTOM + 18, f"{tokens:g}M", SOFT, anchor="middle"))
    parts.append(line(LEFT, BOTTOM, RIGHT, BOTTOM, SOFT))
    parts.append(text(LEFT, HEIGHT - 8, "tokens", SOFT))
    parts.append(text(LEFT + 40, TOP + 26, "loss, nats per token", SOFT))
    return parts
