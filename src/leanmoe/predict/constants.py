"""Constants of kernels on GPUs: fitted to measurements, with how far off they have been.

A file of constants is small, ours, and says what it was fitted to. `leanmoe calibrate` writes one
for your GPU; those under `fitted/` come with leanmoe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import StoredFile
from leanmoe.predict.hardware.gpus import Gpu, Rates
from leanmoe.predict.kernels.features import (
    FEATURES,
    MICROSECOND,
    ExpertsShape,
    PredictedTile,
    Rows,
    features,
)

FITTED = Path(__file__).parent / "fitted"
ANY_GPU = "h200"
"""The GPU whose constants stand in for one that has none; a prediction says so."""
ANY = 1e9
"""More tokens than any step has."""


@dataclass(frozen=True)
class Accuracy:
    """How far predictions were from measurements that the fit had not seen."""

    what: str
    rows: int
    mean: float
    """Mean absolute relative error."""
    p99: float
    worst: float
    is_interpolated: bool = False
    """Whether predictions were held to measured rows of the same layer."""

    def __str__(self) -> str:
        return (
            f"mean {100 * self.mean:.1f}%, 99% of rows within {100 * self.p99:.0f}%, "
            f"worst {100 * self.worst:.0f}% of {self.rows} rows ({self.what})"
        )


@dataclass(frozen=True)
class Regime:
    """Steps in which the kernel uses one kind of tile: those that none before it takes."""

    up_to: float
    """Tokens of the step."""
    tile: PredictedTile | None
    """None: the one that the engine's tuned configuration of this very layer names."""
    values: dict[str, float]
    """Constants of the features that count, in `FEATURES`."""
    tokens_an_expert: float | None = None
    """At most so many tokens for each expert on the GPU."""
    slots_an_expert: float | None = None
    """At most so many slots, of all tokens, for each expert on the GPU."""

    def __post_init__(self) -> None:
        if unknown := set(self.values) - set(FEATURES):
            raise LeanMoeError(f"constants are of {min(unknown)}: known are {', '.join(FEATURES)}")

    def takes(self, shape: ExpertsShape, rows: Rows) -> bool:
        """Whether such a step is in its range."""
        tokens, slots = self.tokens_an_expert, self.slots_an_expert
        return (
            rows.tokens <= self.up_to
            and (tokens is None or rows.tokens <= tokens * shape.experts)
            and (slots is None or rows.tokens * rows.slots <= slots * shape.experts)
        )


@dataclass(frozen=True)
class TunedLayer:
    """A layer that an engine has a configuration of, and the tiles that this names."""

    experts: int
    width: int
    """Width of an expert on a GPU."""
    tiles: str
    """Each up to so many tokens: `24:16x64 96:32x128`."""

    def tile(self, tokens: float) -> PredictedTile | None:
        """The tile of a step."""
        return next((tile for up_to, tile in _tiles(self.tiles) if tokens <= up_to), None)


def tuned_tile(
    tuned: Iterable[TunedLayer], shape: ExpertsShape, tokens: float
) -> PredictedTile | None:
    """The tile of a layer that the engine has a configuration of; None for any other layer."""
    key = shape.experts, shape.width
    return next((each.tile(tokens) for each in tuned if (each.experts, each.width) == key), None)


@cache
def _tiles(words: str) -> tuple[tuple[float, PredictedTile], ...]:
    tiles = []
    for word in words.split():
        up_to, rows, columns = re.split("[:x]", word)
        tiles.append((float(up_to), PredictedTile(int(rows), int(columns))))
    return tuple(tiles)


@dataclass(frozen=True)
class KernelConstants:
    """How long a MoE layer's experts take in one kernel, on one GPU, in one format."""

    kernel: str
    gpu: str
    dtype: str
    regimes: tuple[Regime, ...]
    fitted_to: str
    accuracy: tuple[Accuracy, ...] = ()
    tuned: tuple[TunedLayer, ...] = ()
    least_waves: int = 1
    """Tiles a multiprocessor that keep the memory busy."""

    def __post_init__(self) -> None:
        if not any(regime.tile for regime in self.regimes):
            raise LeanMoeError(f"constants of {self.kernel} have no range of steps")

    def seconds(self, shape: ExpertsShape, rows: Rows, gpu: Gpu) -> float:
        """Time of one layer's experts; 0 where the GPU has no row to compute."""
        if rows.rows <= 0:
            return 0.0
        named = tuned_tile(self.tuned, shape, rows.tokens)
        fitting = [r for r in self.regimes if r.tile is not None or named is not None]
        regime = next((r for r in fitting if r.takes(shape, rows)), fitting[-1])
        tile = regime.tile or named
        assert tile is not None
        constants = np.array([regime.values.get(name, 0.0) for name in FEATURES])
        values = features(shape, rows, gpu, tile, self.least_waves)
        return float(constants @ values) * MICROSECOND

    def borrowed(self) -> KernelConstants:
        """For another GPU, whose tuned configurations are not known."""
        regimes = tuple(regime for regime in self.regimes if regime.tile is not None)
        return replace(self, regimes=regimes, tuned=())


@dataclass(frozen=True)
class Constants(StoredFile):
    """All constants that leanmoe has, by kernel, GPU and format."""

    KIND: ClassVar[str] = "leanmoe_constants"
    VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "constants"

    kernels: tuple[KernelConstants, ...]
    rates: dict[str, Rates]
    provenance: dict[str, Any] = field(default_factory=dict)

    def find(self, kernel: str, gpu: str, dtype: str) -> tuple[KernelConstants, str]:
        """Constants for a kernel and how directly they apply, in words.

        Raises LeanMoeError that lists the kernels there are for that format.
        """
        here = [k for k in self.kernels if k.dtype == dtype and k.kernel == kernel]
        for name in (gpu, ANY_GPU, *(k.gpu for k in here)):
            for found in here:
                if found.gpu == name:
                    borrowed = f"{kernel} {dtype}, as measured on {name}"
                    carried = f"{borrowed}, carried over to {gpu} by its stated rates"
                    return (found, borrowed) if name == gpu else (found.borrowed(), carried)
        known = sorted({f"{k.kernel} ({k.dtype})" for k in self.kernels})
        raise LeanMoeError(
            f"there are no constants for kernel {kernel!r} in {dtype}: there are "
            f"{', '.join(known)}; leanmoe calibrate adds your GPU's"
        )

    def rates_for(self, gpu: str) -> tuple[Rates, str]:
        """Rates of everything but the experts, and where they are from."""
        name = gpu if gpu in self.rates else ANY_GPU
        rates = self.rates[name]
        carried = "" if name == gpu else f", carried over from {name} to {gpu}"
        return rates, rates.fitted_to + carried

    def merged(self, other: Constants) -> Constants:
        """These, with `other`'s first."""
        return Constants(
            other.kernels + self.kernels, {**self.rates, **other.rates}, self.provenance
        )


@cache
def shipped() -> Constants:
    """The constants that come with leanmoe."""
    found = [Constants.load(path) for path in sorted(FITTED.glob("*.json"))]
    return Constants(
        tuple(kernel for each in found for kernel in each.kernels),
        {name: rates for each in found for name, rates in each.rates.items()},
    )


def find_constants(path: Path | None) -> Constants:
    """The shipped constants, a user's own before them."""
    return shipped() if path is None else shipped().merged(Constants.load(path))
