"""Constants of a kernel on a GPU: fitted to measurements, with how far off they have been.

A file of constants is small, ours, and says what it was fitted to. `leanmoe calibrate` writes one
for your GPU; those under `fitted/` come with leanmoe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json
from leanmoe.predict.hardware.collectives import fitted, read_collectives
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.hardware.rates import Rates
from leanmoe.predict.kernels.kernel_constants import KernelConstants, _kernel, _to_json

if TYPE_CHECKING:
    pass


SCHEMA_VERSION = 2
FITTED = Path(__file__).parent / "fitted"


ANY_GPU = "h200"
"""The GPU whose constants stand in for one that has none; a prediction says so."""


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


def find_constants(
    path: Path | None, communication: Path | None = None, gpu: Gpu | None = None
) -> Constants:
    """The shipped constants, a user's own before them, and measured collectives before both."""
    found = shipped() if path is None else shipped().merged(read_constants(path))
    if communication is None or gpu is None:
        return found
    rates, _ = found.rates_for(gpu.name)
    own = fitted(rates, read_collectives(communication), gpu)
    return found.merged(Constants((), {gpu.name: own}))
