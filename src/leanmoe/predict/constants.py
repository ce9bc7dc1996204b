"""Constants of a kernel on a GPU: fitted to measurements, with how far off they have been.

A file of constants is small, ours, and says what it was fitted to. `leanmoe calibrate` writes one
for your GPU; those under `fitted/` come with leanmoe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json
from leanmoe.predict.hardware import Gpu
from leanmoe.predict.kernel_features import (
    FEATURES,
    MICROSECOND,
    ExpertsShape,
    Rows,
    Tile,
    features,
)

SCHEMA_VERSION = 2
FITTED = Path(__file__).parent / "fitted"
ANY_GPU = "h200"
"""The GPU whose constants stand in for one that has none; a prediction says so."""


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
    """Of predictions held to measured rows of the same layer, not of the constants alone."""

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
    tile: Tile | None
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


Tuned = Mapping[tuple[int, int], tuple[tuple[float, Tile], ...]]
"""By experts and expert width on a GPU: the tiles that an engine's configuration names, each up to
so many tokens."""


def tuned_tile(tuned: Tuned, shape: ExpertsShape, tokens: float) -> Tile | None:
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
        found = features(shape, rows, gpu, tile, self.least_waves)
        return float(constants @ found) * MICROSECOND

    def borrowed(self) -> KernelConstants:
        """For another GPU, whose tuned configurations are not known."""
        regimes = tuple(regime for regime in self.regimes if regime.tile is not None)
        return replace(self, regimes=regimes, tuned=MappingProxyType({}))


@dataclass(frozen=True)
class Rates:
    """What the rest of a layer reaches of a GPU's stated rates, and what each call costs."""

    product_bandwidth: float
    product_flops: float
    product_seconds: float
    attention_bandwidth: float
    attention_flops: float
    attention_seconds: float
    attention_sequence_seconds: float
    """Of each sequence that decodes and each of its key-value heads on the GPU."""
    latent_bandwidth: float
    latent_flops: float
    latent_seconds: float
    """Of a layer of latent attention that decodes, beside its products."""
    latent_sequence_seconds: float
    """Of each sequence that decodes."""
    reduce_bandwidth: float
    reduce_seconds: float
    """Of an engine's own all-reduce over 2 GPUs; each doubling of them adds `reduce_hop`."""
    reduce_hop: float
    exchange_bandwidth: float
    exchange_seconds: float
    """Of an all-to-all, dispatch or combine."""
    network_bandwidth: float
    """Share of the link between nodes that an all-to-all reaches."""
    step_seconds: float = 0.0
    """Of an engine's step beside the layers: scheduling, sampling, detokenising."""
    sampled_seconds: float = 0.0
    """Of each sequence in it."""
    layer_seconds: float = 0.0
    """Of a layer beside its products and attention: norms, rotations, cache writes, routing."""
    library_seconds: float = 0.0
    """Of an all-reduce by the library (NCCL) over 2 GPUs."""
    library_hop: float = 0.0
    library_bandwidth: float = 0.0
    """0 where the library's all-reduce is not known."""
    gather_seconds: float = 0.0
    """Of its all-gather or reduce-scatter over 2 GPUs."""
    gather_hop: float = 0.0
    gather_bandwidth: float = 0.0
    """0 where these are not known."""
    fitted_to: str = ""


@dataclass(frozen=True)
class Constants:
    """All constants that leanmoe has, by kernel, GPU and format."""

    kernels: tuple[KernelConstants, ...]
    rates: Mapping[str, Rates]
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

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
    found = [read_constants(path) for path in sorted(FITTED.glob("*.json"))]
    return Constants(
        tuple(kernel for each in found for kernel in each.kernels),
        {name: rates for each in found for name, rates in each.rates.items()},
    )


def write_constants(path: Path, constants: Constants) -> None:
    """Writes a file of constants, whole or not at all."""
    write_json(
        path,
        {
            "leanmoe_constants": SCHEMA_VERSION,
            "kernels": [_to_json(kernel) for kernel in constants.kernels],
            "rates": {name: asdict(rates) for name, rates in constants.rates.items()},
            "provenance": dict(constants.provenance),
        },
    )


def read_constants(path: Path) -> Constants:
    """Reads what `write_constants` wrote; LeanMoeError where it is malformed."""
    value = read_json(path, "constants")
    version = value.get("leanmoe_constants") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise LeanMoeError(
            f"constants {path} have schema version {version!r}: this leanmoe reads {SCHEMA_VERSION}"
        )
    try:
        return Constants(
            tuple(_kernel(entry) for entry in value["kernels"]),
            {name: Rates(**entry) for name, entry in value["rates"].items()},
            value["provenance"],
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise LeanMoeError(f"constants {path} are damaged ({reason})") from error


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


def read_tiles(words: str) -> tuple[tuple[float, Tile], ...]:
    """Tiles by tokens, from words such as `24:16x64 96:32x128`: up to, rows, columns."""
    found = []
    for word in words.split():
        up_to, tile = word.split(":")
        rows, columns = tile.split("x")
        found.append((float(up_to), Tile(int(rows), int(columns))))
    return tuple(found)


def _regime(entry: Mapping[str, Any]) -> Regime:
    if set(entry["values"]) - set(FEATURES):
        raise ValueError(f"regime {entry['up_to']} has a feature that is not known")
    tile = None if entry["tile"] is None else Tile(*entry["tile"])
    values = {name: float(value) for name, value in entry["values"].items()}
    limits = entry["tokens_an_expert"], entry["slots_an_expert"]
    return Regime(entry["up_to"], tile, values, *limits)
