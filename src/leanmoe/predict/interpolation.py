"""A model held to measured rows: how much longer than modelled they took, and between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Ratios:
    """Measured over modelled time at measured tokens, by rising tokens; none are 1 everywhere."""

    points: tuple[tuple[float, float], ...] = ()
    """Tokens, ratio."""

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Ratios:
        """From (tokens, ratio) in any order."""
        return cls(tuple(sorted(points)))

    def at(self, tokens: float) -> float:
        """Between two rows, linear over the logarithm of tokens; beyond the ends, the end's."""
        points = self.points
        if not points:
            return 1.0
        if tokens <= points[0][0]:
            return points[0][1]
        for (low, one), (high, other) in pairwise(points):
            if tokens <= high:
                share = math.log(tokens / low) / math.log(high / low)
                return one + share * (other - one)
        return points[-1][1]
