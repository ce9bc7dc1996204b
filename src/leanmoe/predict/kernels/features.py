"""What a MoE layer has to do on one GPU: rows, distinct experts, tiles, bytes and products.

Letters: T tokens of the step, R rows (slots that this GPU computes), D distinct experts it
activates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import from_json
from leanmoe.predict.hardware.gpus import Gpu

MICROSECOND = 1e-6
NEARLY = 0.999
"""Share of a step's slots below which some are another GPU's."""


TESTED_MULTIPLE, TESTED_EXPERTS = 128, 8
"""Widths, and experts on a GPU, that the stated accuracy is of."""


@dataclass(frozen=True, order=True)
class PredictedTile:
    """What one block of a kernel computes: so many rows of one expert by so many columns."""

    rows: int
    columns: int

    def to_json(self) -> list[int]:
        """Rows and columns."""
        return [self.rows, self.columns]

    @classmethod
    def from_json(cls, value: Any, where: str) -> PredictedTile:
        """Reads what `to_json` wrote; raises LeanMoeError for anything but two whole numbers."""
        sizes = from_json(tuple[int, ...], value, where)
        if len(sizes) != 2:
            raise LeanMoeError(f"{where} is {value!r}: it must be two numbers, rows and columns")
        return cls(*sizes)


TILES = (
    PredictedTile(16, 64),
    PredictedTile(32, 64),
    PredictedTile(64, 128),
    PredictedTile(128, 128),
)
"""That a kernel is taken to choose from where nothing says which it takes."""


@dataclass(frozen=True)
class ExpertsShape:
    """A MoE layer's experts as one GPU holds them."""

    hidden: int
    width: float
    """Width of one expert, after tensor parallelism."""
    experts: int
    """On this GPU."""
    matrices: int = 3
    """3 with a gate, 2 without."""
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    padded_to: int = 1
    """Multiple that the format pads both widths to, in memory as in the products."""

    @property
    def padded_hidden(self) -> int:
        """Hidden width as it is stored."""
        return math.ceil(self.hidden / self.padded_to) * self.padded_to

    @property
    def padded_width(self) -> float:
        """Expert width as it is stored."""
        if self.padded_to == 1:
            return self.width
        return math.ceil(self.width / self.padded_to) * self.padded_to

    @property
    def is_as_tested(self) -> bool:
        """Whether the layer is like those that constants were tested on."""
        return self.width % TESTED_MULTIPLE == 0 and self.experts >= TESTED_EXPERTS

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights here."""
        return self.matrices * self.padded_hidden * self.padded_width * self.weight_bytes


@dataclass(frozen=True)
class Rows:
    """What routing gives one GPU in a step."""

    tokens: float
    """All tokens of the step that the layer sees, wherever their experts are."""
    slots: float
    """Experts a token uses, mean."""
    rows: float
    """Slots whose experts are on this GPU."""
    distinct: float
    """Experts active on this GPU."""
    counts: tuple[int, ...] | None = None
    """Rows of each active expert, where they are known exactly."""

    def tiles(self, rows: int) -> float:
        """Tiles of `rows` rows: every active expert's rows, rounded up."""
        if self.counts is not None:
            return float(sum(-(-count // rows) for count in self.counts))
        if self.distinct <= 0:
            return 0.0
        return self.distinct * tiles_per_expert(self.rows / self.distinct, rows)


def tiles_per_expert(mean_rows: float, tile: int) -> float:
    """Expected tiles of an active expert with `mean_rows` rows on average.

    Rows of an active expert are taken as Poisson, given that there is at least one. Beyond what is
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
    "spread",
    "strides",
)
"""What the time of a layer is made of. `weights`, `products`, `longer` (of the two) and the three
of activations are the seconds they would take at the GPU's stated rates, so that their constants
are the inverse of an efficiency and carry over to another GPU. The rest cost a time each: a call,
an expert on the GPU, a wave of tiles over its multiprocessors (and each 1,000 of the products'
depth in it), each 1,000 of the hidden and expert width, experts spread over GPUs (slots of other
GPUs are sorted out), and `strides`: a wave's depth squared, since rows of a deep matrix lie far
apart in memory."""


def features(
    shape: ExpertsShape, rows: Rows, gpu: Gpu, tile: PredictedTile, least_waves: int = 1
) -> NDArray[np.float64]:
    """The values of `FEATURES` for tiles of that size: microseconds, or counts.

    Fewer than `least_waves` tiles a multiprocessor do not keep the memory busy: they take as long
    as so many would.
    """
    hidden, width, gates = shape.padded_hidden, shape.padded_width, shape.matrices - 1
    tiles = rows.tiles(tile.rows)
    up = tiles * math.ceil(width / tile.columns) * gates
    down = tiles * math.ceil(hidden / tile.columns)
    rate = gpu.flops if shape.activation_bytes > 1 else gpu.flops_fp8
    products = 2 * tile.rows * tile.columns * (up * hidden + down * width) / rate
    weights = rows.distinct * shape.expert_bytes / gpu.bandwidth
    passed = rows.rows * (hidden + (gates + 1) * width) * 2 / gpu.bandwidth
    slots = rows.tokens * rows.slots * 2 / gpu.bandwidth
    waves_up = max(_waves(up / gpu.multiprocessors, rows), least_waves)
    waves_down = max(_waves(down / gpu.multiprocessors, rows), least_waves)
    seconds = (
        weights,
        products,
        max(weights, products),
        passed,
        slots * hidden,
        slots * width * (gates + 1),
    )
    return np.array(
        [
            1.0,
            *(value / MICROSECOND for value in seconds),
            float(shape.experts),
            waves_up + waves_down,
            waves_up * hidden / 1e3,
            waves_down * width / 1e3,
            hidden / 1e3,
            width / 1e3,
            float(rows.rows < NEARLY * rows.tokens * rows.slots),
            (waves_up * hidden**2 + waves_down * width**2) / 1e6,
        ]
    )


def _waves(tiles: float, rows: Rows) -> float:
    """Rounded up; where tiles are known on average only, so is what rounding them up costs."""
    return math.ceil(tiles) if rows.counts is not None else tiles + 0.5
