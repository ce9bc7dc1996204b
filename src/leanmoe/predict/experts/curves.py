"""Distinct experts and slots a token over the tokens of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leanmoe.core.errors import LeanMoeError


@dataclass(frozen=True)
class Curve:
    """Distinct experts and slots a token over the tokens of a step."""

    tokens: tuple[float, ...]
    distinct: tuple[float, ...]
    slots: tuple[float, ...]
    origin: str
    """Measured (replayed traces) or how it was modelled."""
    experts: int
    columns: float = 0.0
    """Slots of a token in an engine's tensors, used or skipped; 0 for as many as are used."""
    is_shared: bool = False
    """Whether tokens of a step share experts (`Rule.is_batch_aware`)."""
    most_loaded: tuple[float, ...] = ()
    """Distinct experts of the most loaded GPU, where experts are spread and this was counted."""
    exchanges_demand: bool = False
    """Whether data-parallel ranks tell each other what their tokens choose."""

    def at(self, tokens: float) -> tuple[float, float]:
        """Distinct experts and mean slots a token in a step of so many tokens.

        Interpolated over the logarithm of tokens. Beyond the last point the rest of the experts
        is activated as independent tokens would activate it.
        """
        place = math.log(max(tokens, 1.0))
        grid = np.log(self.tokens)
        slots = float(np.interp(place, grid, self.slots))
        if tokens > self.tokens[-1]:
            share = self.distinct[-1] / self.experts
            active = self.experts * (1 - (1 - min(share, 1.0)) ** (tokens / self.tokens[-1]))
            return float(active), slots
        distinct = float(np.interp(place, grid, self.distinct))
        return min(distinct, slots * max(tokens, 1.0)), slots

    def most_loaded_at(self, tokens: float) -> float | None:
        """Distinct experts of the most loaded GPU; None where that was not counted.

        Beyond the last point it grows with the distinct experts of all GPUs.
        """
        if not self.most_loaded:
            return None
        distinct, _ = self.at(tokens)
        shares = np.array(self.most_loaded) / np.maximum(self.distinct, 1e-9)
        place = math.log(max(tokens, 1.0))
        return distinct * float(np.interp(place, np.log(self.tokens), shares))


def from_points(
    points: Sequence[tuple[float, float, float]],
    experts: int,
    origin: str,
    columns: float = 0.0,
    is_shared: bool = False,
    most_loaded: Sequence[float] = (),
    exchanges_demand: bool = False,
) -> Curve:
    """A curve from (tokens, distinct, slots), as replayed traces give them.

    `most_loaded` are the distinct experts of the most loaded GPU at each of these points.
    """
    if not points:
        raise LeanMoeError("a curve of distinct experts needs at least one point")
    tokens, distinct, slots = zip(*sorted(points), strict=True)
    most = tuple(value for _, value in sorted(zip(points, most_loaded, strict=bool(most_loaded))))
    columns_of = (origin, experts, columns, is_shared, most, exchanges_demand)
    return Curve(tuple(tokens), tuple(distinct), tuple(slots), *columns_of)
