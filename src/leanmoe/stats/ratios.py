"""How much faster a variant ran: ratios of paired runs with their interval. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from leanmoe.core.errors import LeanMoeError


@dataclass(frozen=True)
class Ratio:
    """A variant's figure over the first variant's, paired by repeat."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, first: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> Ratio:
        """Student's t interval on the logarithms of the paired ratios, r_i = other_i / first_i.

            exp(mean(log r) ± t(1 − (1 − confidence) / 2; n − 1) · std(log r) / √n)

        Logarithms, because a ratio and its inverse must get the same verdict. Raises LeanMoeError
        for fewer than 2 repeats, which have no spread.
        """
        logs = np.log(np.asarray(other) / np.asarray(first))
        count = len(logs)
        if count < 2:
            raise LeanMoeError(f"{count} repeat: at least 2 are needed for an interval")
        reach = stats.t.ppf(0.5 + confidence / 2, count - 1) * logs.std(ddof=1) / math.sqrt(count)
        centre = float(logs.mean())
        return cls(
            float(np.exp(np.median(logs))),
            float(math.exp(centre - reach)),
            float(math.exp(centre + reach)),
            count,
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers under their names."""
        return asdict(self)
