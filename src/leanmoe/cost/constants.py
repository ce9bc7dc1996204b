"""Constants of a kernel on a GPU: fitted to measurements, with how far off they have been.

A file of constants is small, ours, and says what it was fitted to. `leanmoe calibrate` writes one
for your GPU; those under `fitted/` come with leanmoe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from leanmoe.cost.hardware import Gpu
from leanmoe.cost.work import FEATURES, MICROSECOND, TILE_ROWS, ExpertsShape, Rows, features
from leanmoe.errors import LeanMoeError
from leanmoe.storage import read_json, write_json

SCHEMA_VERSION = 1
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

    def __str__(self) -> str:
        return (
            f"mean {100 * self.mean:.1f}%, 99% of rows within {100 * self.p99:.0f}%, "
            f"worst {100 * self.worst:.0f}% of {self.rows} rows ({self.what})"
        )


@dataclass(frozen=True)
class Regime:
    """Steps of at most `up_to` tokens: the kernel uses one kind of tile there."""

    up_to: int
    tile: int
    """Rows of a tile."""
    values: Mapping[str, float]
    """Constants of the features that count, in `FEATURES`."""


@dataclass(frozen=True)
class KernelConstants:
    """How long a MoE layer's experts take in one kernel, on one GPU, in one format."""

    kernel: str
    gpu: str
    dtype: str
    regimes: tuple[Regime, ...]
    fitted_to: str
    accuracy: tuple[Accuracy, ...] = ()

    def seconds(self, shape: ExpertsShape, rows: Rows, gpu: Gpu) -> float:
        """Time of one layer's experts; 0 where the GPU has no row to compute."""
        if rows.rows <= 0:
            return 0.0
        regime = next((r for r in self.regimes if rows.tokens <= r.up_to), self.regimes[-1])
        found = features(shape, rows, gpu, regime.tile)
        constants = np.array([regime.values.get(name, 0.0) for name in FEATURES])
        return float(constants @ found) * MICROSECOND


@dataclass(frozen=True)
class Rates:
    """What the rest of a layer reaches of a GPU's stated rates, and what each call costs."""

    product_bandwidth: float
    product_flops: float
    product_seconds: float
    attention_bandwidth: float
    attention_flops: float
    attention_seconds: float
    reduce_bandwidth: float
    reduce_seconds: float
    """Of an all-reduce over 2 GPUs; more GPUs add `reduce_hop` each."""
    reduce_hop: float
    exchange_bandwidth: float
    exchange_seconds: float
    """Of an all-to-all, dispatch or combine."""
    network_bandwidth: float
    """Share of the link between nodes that an all-to-all reaches."""
    step_seconds: float = 0.0
    """Of an engine's step beside the layers: scheduling, sampling, detokenising."""
    layer_seconds: float = 0.0
    """Of a layer beside its products and attention: norms, rotations, cache writes, routing."""
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
                    return found, borrowed if name == gpu else carried
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
            "kernels": [asdict(kernel) for kernel in constants.kernels],
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


def _kernel(entry: Mapping[str, Any]) -> KernelConstants:
    regimes = tuple(_regime(each) for each in entry["regimes"])
    if not regimes:
        raise ValueError("no regime")
    accuracy: Sequence[Mapping[str, Any]] = entry["accuracy"]
    return KernelConstants(
        entry["kernel"],
        entry["gpu"],
        entry["dtype"],
        regimes,
        entry["fitted_to"],
        tuple(Accuracy(**each) for each in accuracy),
    )


def _regime(entry: Mapping[str, Any]) -> Regime:
    if entry["tile"] not in TILE_ROWS or set(entry["values"]) - set(FEATURES):
        raise ValueError(f"regime {entry['up_to']} has a tile or a feature that is not known")
    return Regime(entry["up_to"], entry["tile"], {k: float(v) for k, v in entry["values"].items()})
