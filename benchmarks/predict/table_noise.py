"""What no model can do better: how far a table's rows contradict one another.

Part of `fit`. More work on one GPU cannot take less time, if a kernel is a function of its
work. Where a table says that it does, every model that never falls as work grows is off by half of
the difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.predict.kernels.tables import Measured

BEATEN = 2.0
"""A row is left out of the second score where as much work or more took less than half its time."""
LIMIT = 0.12
"""The worst error that is allowed."""


def times_beaten(rows: Sequence[Measured]) -> NDArray[np.float64]:
    """By how many times each row took longer than the fastest of at least as much work.

    That is the same model's layer with no more tensor and expert parallelism and no fewer tokens.
    """
    layers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        layers[row.key[:4]].append(place)
    found = np.ones(len(rows))
    for places in layers.values():
        values = [(rows[p].tensor, rows[p].expert, rows[p].tokens, rows[p].seconds) for p in places]
        tensor, expert, tokens, seconds = (np.array(column) for column in zip(*values, strict=True))
        for number, place in enumerate(places):
            larger = (tensor <= tensor[number]) & (expert <= expert[number])
            larger &= tokens >= tokens[number]
            found[place] = seconds[number] / seconds[larger].min()
    return found


def least_rising(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The never-falling curve with the least mean absolute relative error, by rising tokens.

    Pool adjacent violators; a pool's value is the median of its times, weighted by their inverse.
    """
    pools: list[list[float]] = []
    for value in seconds:
        pools.append([float(value)])
        while len(pools) > 1 and _middle(pools[-2]) > _middle(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return np.array([_middle(pool) for pool in pools for _ in pool])


def _middle(values: Sequence[float]) -> float:
    ordered = np.sort(values)
    shares = np.cumsum(1 / ordered)
    return float(ordered[np.searchsorted(shares, shares[-1] / 2)])


def noise(rows: Sequence[Measured]) -> dict[str, Any]:
    """A table's own contradictions, as what they leave for any model that rises with work."""
    curves: dict[tuple[int, ...], list[Measured]] = defaultdict(list)
    for row in rows:
        curves[row.key].append(row)
    off: list[float] = []
    for curve in curves.values():
        seconds = np.array([row.seconds for row in sorted(curve, key=lambda row: row.tokens)])
        off += np.abs(least_rising(seconds) / seconds - 1).tolist()
    beaten = times_beaten(rows)
    half = (beaten - 1) / (beaten + 1)
    return {
        "rows": len(rows),
        "best rising curve through each layer's own points, mean error": _short(np.mean(off)),
        "worst error of any model that rises with work, at least": _short(half.max()),
        "rows that cannot be met within 12%, with those that contradict them": _short(
            (half > LIMIT).mean()
        ),
        "rows that at least as much work beat twofold": _short((beaten > BEATEN).mean()),
    }


def _short(value: float | np.floating[Any]) -> float:
    return float(f"{value:.4g}")
