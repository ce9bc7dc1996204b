"""What a MoE layer has to do on one GPU: rows, distinct experts, tiles, bytes and products.

Letters: T tokens of the step, R rows (slots that this GPU computes), D distinct experts it wakes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from leanmoe.cost.hardware import Gpu

TILE_ROWS = (16, 32, 64, 128)
"""Rows of a tile that kernels choose from."""
NARROW, WIDE = 64, 128
"""Columns of a tile: narrow beside few rows."""
MICROSECOND = 1e-6
TESTED_MULTIPLE, TESTED_EXPERTS = 128, 8
"""Widths, and experts on a GPU, that the stated accuracy is of."""


@dataclass(frozen=True)
class ExpertsShape:
    """A MoE layer's experts as one GPU holds them."""

    hidden: int
    width: float
    """Of one expert, after tensor parallelism."""
    experts: int
    """On this GPU."""
    matrices: int = 3
    """3 with a gate, 2 without."""
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0

    @property
    def is_as_tested(self) -> bool:
        """Whether the layer is like those that constants were tested on."""
        return self.width % TESTED_MULTIPLE == 0 and self.experts >= TESTED_EXPERTS

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights here."""
        return self.matrices * self.hidden * self.width * self.weight_bytes


@dataclass(frozen=True)
class Rows:
    """What routing gives one GPU in a step."""

    tokens: float
    """Of the step: all that the layer sees, wherever their experts are."""
    slots: float
    """Experts a token uses, mean."""
    rows: float
    """Slots whose experts are on this GPU."""
    distinct: float
    """Experts awake on this GPU."""
    counts: tuple[int, ...] | None = None
    """Rows of each awake expert, where they are known exactly."""

    def tiles(self, rows: int) -> float:
        """Tiles of `rows` rows: every awake expert's rows, rounded up."""
        if self.counts is not None:
            return float(sum(-(-count // rows) for count in self.counts))
        if self.distinct <= 0:
            return 0.0
        return self.distinct * tiles_per_expert(self.rows / self.distinct, rows)


def tiles_per_expert(mean_rows: float, tile: int) -> float:
    """Expected tiles of an awake expert with `mean_rows` rows on average.

    Rows of an awake expert are taken as Poisson, given that there is at least one. Beyond what is
    tabulated rounding up costs half a tile.
    """
    grid, values = _tile_table(tile)
    if mean_rows >= grid[-1]:
        return mean_rows / tile + 0.5
    return float(np.interp(math.log(max(mean_rows, 1.0)), np.log(grid), values))


@cache
def _tile_table(tile: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    grid = np.unique(np.concatenate([np.linspace(1.0, 4.0, 31), np.geomspace(4.0, 600.0, 80)]))
    values = []
    for mean in grid:
        rate = _untruncated(float(mean))
        most = int(mean + 12 * math.sqrt(mean) + 20)
        count = np.arange(1, most)
        logs = count * math.log(max(rate, 1e-12)) - rate - _log_factorials(most)
        mass = np.exp(logs)
        values.append(float((np.ceil(count / tile) * mass).sum() / mass.sum()))
    return grid, np.array(values)


def _log_factorials(most: int) -> NDArray[np.float64]:
    return np.asarray(np.cumsum(np.log(np.arange(1, most))))


def _untruncated(mean: float) -> float:
    """The rate of a Poisson variable whose mean, given it is 1 or more, is `mean`."""
    if mean <= 1.0:
        return 0.0
    rate = mean
    for _ in range(60):
        rate = mean * (1 - math.exp(-rate))
    return rate


FEATURES = (
    "call",
    "weights",
    "products",
    "longer",
    "activations",
    "slots_hidden",
    "slots_width",
    "experts",
    "waves",
    "waves_hidden",
    "waves_width",
    "hidden",
    "width",
)
"""What the time of a layer is made of. `weights`, `products`, `longer` (of the two) and the three
of activations are the seconds they would take at the GPU's stated rates, so that their constants
are the inverse of an efficiency and carry over to another GPU. The rest cost a time each: a call,
an expert on the GPU, a wave of tiles over its multiprocessors (and each 1,000 of the products'
depth in it), and each 1,000 of the hidden and expert width."""


def features(shape: ExpertsShape, rows: Rows, gpu: Gpu, tile: int) -> NDArray[np.float64]:
    """The values of `FEATURES` for tiles of `tile` rows: microseconds, or counts."""
    columns = NARROW if tile <= 32 else WIDE
    gates = shape.matrices - 1
    tiles = rows.tiles(tile)
    up = tiles * math.ceil(shape.width / columns) * gates
    down = tiles * math.ceil(shape.hidden / columns)
    rate = gpu.flops if shape.activation_bytes > 1 else gpu.flops_fp8
    products = 2 * tile * columns * (up * shape.hidden + down * shape.width) / rate
    weights = rows.distinct * shape.expert_bytes / gpu.bandwidth
    passed = rows.rows * (shape.hidden + (gates + 1) * shape.width) * 2 / gpu.bandwidth
    slots = rows.tokens * rows.slots * 2 / gpu.bandwidth
    waves_up = math.ceil(up / gpu.multiprocessors)
    waves_down = math.ceil(down / gpu.multiprocessors)
    seconds = (
        weights,
        products,
        max(weights, products),
        passed,
        slots * shape.hidden,
        slots * shape.width * (gates + 1),
    )
    return np.array(
        [
            1.0,
            *(value / MICROSECOND for value in seconds),
            float(shape.experts),
            waves_up + waves_down,
            waves_up * shape.hidden / 1e3,
            waves_down * shape.width / 1e3,
            shape.hidden / 1e3,
            shape.width / 1e3,
        ]
    )
