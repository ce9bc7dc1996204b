"""Constants of kernels on GPUs: fitted to measurements, with how far off they have been.

A file of constants is small, ours, and says what it was fitted to. `leanmoe calibrate` writes one
for your GPU; those under `fitted/` come with leanmoe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import StoredFile
from leanmoe.predict.hardware.gpus import Rates
from leanmoe.predict.kernels.kernel_constants import KernelConstants

FITTED = Path(__file__).parent / "fitted"
ANY_GPU = "h200"
"""The GPU whose constants stand in for one that has none; a prediction says so."""


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
