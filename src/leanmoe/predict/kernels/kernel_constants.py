"""Constants of a MoE kernel on a GPU, and how far off its predictions have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import (
    FEATURES,
    MICROSECOND,
    ExpertsShape,
    PredictedTile,
    Rows,
    features,
)

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
    values: Mapping[str, float]
    """Constants of the features that count, in `FEATURES`."""
    tokens_an_expert: float | None = None
    """At most so many tokens for each expert on the GPU."""
    slots_an_expert: float | None = None
    """At most so many slots, of all tokens, for each expert on the GPU."""

    def takes(self, shape: ExpertsShape, rows: Rows) -> bool:
        """Whether such a step is in its range."""
        tokens, slots = self.tokens_an_expert, self.slots_an_expert
        return (
            rows.tokens <= self.up_to
            and (tokens is None or rows.tokens <= tokens * shape.experts)
            and (slots is None or rows.tokens * rows.slots <= slots * shape.experts)
        )


Tuned = Mapping[tuple[int, int], tuple[tuple[float, PredictedTile], ...]]
"""By experts and expert width on a GPU: the tiles that an engine's configuration names, each up to
so many tokens."""


def tuned_tile(tuned: Tuned, shape: ExpertsShape, tokens: float) -> PredictedTile | None:
    """The tile of a layer that the engine has a configuration of; None for any other layer."""
    if shape.width != int(shape.width):
        return None
    steps = tuned.get((shape.experts, int(shape.width)), ())
    return next((tile for up_to, tile in steps if tokens <= up_to), None)


@dataclass(frozen=True)
class KernelConstants:
    """How long a MoE layer's experts take in one kernel, on one GPU, in one format."""

    kernel: str
    gpu: str
    dtype: str
    regimes: tuple[Regime, ...]
    fitted_to: str
    accuracy: tuple[Accuracy, ...] = ()
    tuned: Tuned = field(default_factory=lambda: MappingProxyType({}))
    least_waves: int = 1
    """Tiles a multiprocessor that keep the memory busy."""

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
        return replace(self, regimes=regimes, tuned=MappingProxyType({}))


def _to_json(kernel: KernelConstants) -> dict[str, Any]:
    regimes = [
        {**asdict(r), "values": dict(r.values), "tile": r.tile and [r.tile.rows, r.tile.columns]}
        for r in kernel.regimes
    ]
    tuned = [
        {
            "experts": experts,
            "width": width,
            "tiles": " ".join(f"{up_to:.0f}:{t.rows}x{t.columns}" for up_to, t in steps),
        }
        for (experts, width), steps in kernel.tuned.items()
    ]
    plain = ("kernel", "gpu", "dtype", "fitted_to", "least_waves")
    whole = {name: getattr(kernel, name) for name in plain}
    accuracy = [asdict(each) for each in kernel.accuracy]
    return {**whole, "regimes": regimes, "accuracy": accuracy, "tuned": tuned}


def _kernel(entry: Mapping[str, Any]) -> KernelConstants:
    regimes = tuple(_regime(each) for each in entry["regimes"])
    if not any(regime.tile for regime in regimes):
        raise ValueError("no regime")
    accuracy: Sequence[Mapping[str, Any]] = entry["accuracy"]
    return KernelConstants(
        entry["kernel"],
        entry["gpu"],
        entry["dtype"],
        regimes,
        entry["fitted_to"],
        tuple(Accuracy(**each) for each in accuracy),
        {(each["experts"], each["width"]): read_tiles(each["tiles"]) for each in entry["tuned"]},
        entry["least_waves"],
    )


def read_tiles(words: str) -> tuple[tuple[float, PredictedTile], ...]:
    """Tiles by tokens, from words such as `24:16x64 96:32x128`: up to, rows, columns."""
    tiles = []
    for word in words.split():
        up_to, tile = word.split(":")
        rows, columns = tile.split("x")
        tiles.append((float(up_to), PredictedTile(int(rows), int(columns))))
    return tuple(tiles)


def _regime(entry: Mapping[str, Any]) -> Regime:
    if set(entry["values"]) - set(FEATURES):
        raise ValueError(f"regime {entry['up_to']} has a feature that is not known")
    tile = None if entry["tile"] is None else PredictedTile(*entry["tile"])
    values = {name: float(value) for name, value in entry["values"].items()}
    limits = entry["tokens_an_expert"], entry["slots_an_expert"]
    return Regime(entry["up_to"], tile, values, *limits)
