"""What interleaved runs say of a gain: the ratio of their figures, and when enough were run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import RatioOfRuns

FIRST_LOOK = 8
"""Repeats; the fewest at which a signed-rank interval holds with 99% confidence."""


@dataclass(frozen=True)
class Ratio(RatioOfRuns):
    """A variant's figure over the first variant's, paired by repeat."""

    @classmethod
    def of(cls, first: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> Ratio:
        """The interval of Wilcoxon's signed ranks on the logarithms of r_i = other_i / first_i.

        Point and ends are the median and two order statistics of the means of all pairs of
        logarithms, (log r_i + log r_j) / 2 with i <= j (Hodges and Lehmann, Annals of Mathematical
        Statistics 34, 1963). The order within a repeat is drawn, so that a machine that drifts or
        stutters meets both variants alike: the logarithms are symmetric about the true one, which
        is all that this needs, and one run that stuttered moves it little. So few repeats that no
        such interval holds with `confidence` get Student's t about the mean of the logarithms.
        Raises LeanMoeError for fewer than 2 repeats, which have no spread.
        """
        logs = np.log(np.asarray(other, float) / np.asarray(first, float))
        if len(logs) < 2:
            raise LeanMoeError(f"{len(logs)} repeat: at least 2 are needed for an interval")
        low, middle, high = _signed_rank(logs, confidence) or _student(logs, confidence)
        return cls(math.exp(middle), math.exp(low), math.exp(high), len(logs))

    def is_within(self, precision: float) -> bool:
        """Whether the interval reaches at most ± `precision` about its middle, as a share."""
        return math.sqrt(self.high / self.low) <= 1 + precision

    def to_json(self) -> dict[str, Any]:
        """The numbers under their names."""
        return asdict(self)


@dataclass(frozen=True)
class Looks:
    """Repeats are looked at after 8, 16, 32, ... of at most `most`, and end once precise enough."""

    most: int
    precision: float
    confidence: float

    @property
    def numbers(self) -> tuple[int, ...]:
        """After how many repeats there is a look; the last is `most`."""
        doubled = (FIRST_LOOK << n for n in range(self.most.bit_length()))
        return (*(number for number in doubled if number < self.most), self.most)

    def ratio(self, first: Sequence[float], other: Sequence[float]) -> Ratio:
        """The ratio with the looks paid for: each has its part of the error (Bonferroni)."""
        return Ratio.of(first, other, 1 - (1 - self.confidence) / len(self.numbers))

    def are_enough(self, repeats: int, ratios: Sequence[Ratio]) -> bool:
        """Whether the comparison ends after so many repeats with these ratios."""
        precise = all(ratio.is_within(self.precision) for ratio in ratios)
        return repeats >= self.most or (repeats in self.numbers and precise)


Interval = tuple[float, float, float]
"""Low end, point and high end."""


def _signed_rank(logs: NDArray[np.float64], confidence: float) -> Interval | None:
    count = len(logs)
    chances = np.ones(1)
    for rank in range(1, count + 1):  # how likely each sum of positive ranks is without a gain
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    outside = int(np.searchsorted(chances.cumsum(), (1 - confidence) / 2, side="right"))
    if not outside:
        return None
    means = np.sort(np.add.outer(logs, logs)[np.triu_indices(count)] / 2)
    return float(means[outside - 1]), float(np.median(means)), float(means[-outside])


def _student(logs: NDArray[np.float64], confidence: float) -> Interval:
    middle = float(logs.mean())
    reach = stats.t.ppf(0.5 + confidence / 2, len(logs) - 1) * stats.sem(logs)
    return middle - float(reach), middle, middle + float(reach)
