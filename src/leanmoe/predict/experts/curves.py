"""Distinct experts and slots a token over the tokens of a step, and what a plan activates so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Band, Plan, Rule


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


CurveOf = Callable[[int, Rule], Curve]
"""A MoE layer's curve under a rule."""


@dataclass(frozen=True)
class Active:
    """So many layers that activate the same."""

    layers: int
    distinct: float
    rows: float
    experts: int
    """That remain in the layer."""
    columns: float = 0.0
    """Slots, used or skipped, in an engine's tensors."""
    is_shared: bool = False
    """Whether tokens share experts there."""
    most_loaded: float | None = None
    """Distinct experts of the most loaded GPU; None where that was not counted."""
    exchanges_demand: bool = False
    """Whether data-parallel ranks tell each other what their tokens choose."""


class Activation:
    """Distinct experts and rows of every MoE layer, by the tokens of a step."""

    def __init__(self, model: MoEShape, plan: Plan | None, curve_of: CurveOf) -> None:
        self._plan = plan
        layers = len(model.moe_layers)
        bands = [] if plan is None else list(plan.bands)
        self._bands = [(band.up_to, _grouped(band.rules, curve_of)) for band in bands]
        self._full = _grouped((Rule(),) * layers, curve_of)
        prompt = () if plan is None else plan.prompt
        self._prompt = _paired(prompt, bands, layers, curve_of) if prompt else None
        used = [curve for _, groups in self._bands for curve, _ in groups]
        used += [curve for curve, _ in self._full]
        used += [other for pairs in self._prompt or [] for (_, other), _ in pairs]
        self.origins = sorted({curve.origin for curve in used})

    def layers(self, decoding: float, prompt: float) -> list[Active]:
        """What a step activates with so many tokens that decode and so many of prompts."""
        if self._prompt is None:
            return [
                _active(curve, n, decoding + prompt) for curve, n in self._band(decoding + prompt)
            ]
        number = next(
            (n for n, (up_to, _) in enumerate(self._bands) if up_to is None or decoding <= up_to),
            len(self._bands),
        )
        mixed = []
        for (one, other), count in self._prompt[number]:
            mine = _active(one, count, decoding)
            theirs = _active(other, count, prompt)
            total = max(mine.experts, theirs.experts)
            missed = (1 - mine.distinct / total) * (1 - theirs.distinct / total)
            active, rows = total * (1 - missed), mine.rows + theirs.rows
            columns, is_shared = mine.columns + theirs.columns, one.is_shared or other.is_shared
            most, exchanges_demand = (
                _most_decoding(mine, theirs, active),
                one.exchanges_demand or other.exchanges_demand,
            )
            mixed.append(
                Active(count, active, rows, total, columns, is_shared, most, exchanges_demand)
            )
        return mixed

    def _band(self, tokens: float) -> list[tuple[Curve, int]]:
        for up_to, groups in self._bands:
            if up_to is None or tokens <= up_to:
                return groups
        return self._full


def _active(curve: Curve, layers: int, tokens: float) -> Active:
    if tokens <= 0:
        return Active(layers, 0.0, 0.0, curve.experts)
    distinct, slots = curve.at(tokens)
    columns = max(curve.columns, slots) * tokens
    most, is_shared = curve.most_loaded_at(tokens), curve.is_shared
    rows, experts = slots * tokens, curve.experts
    return Active(layers, distinct, rows, experts, columns, is_shared, most, curve.exchanges_demand)


def _most_decoding(one: Active, other: Active, distinct: float) -> float | None:
    """Distinct experts of the most loaded GPU: as uneven as the more uneven of the two."""
    shares = [
        each.most_loaded / each.distinct
        for each in (one, other)
        if each.most_loaded is not None and each.distinct > 0
    ]
    return max(shares) * distinct if shares else None


def _grouped(rules: tuple[Rule, ...], curve_of: CurveOf) -> list[tuple[Curve, int]]:
    return list(Counter(curve_of(layer, rule) for layer, rule in enumerate(rules)).items())


def _paired(
    prompt: tuple[Rule, ...], bands: list[Band], layers: int, curve_of: CurveOf
) -> list[list[tuple[tuple[Curve, Curve], int]]]:
    """For each band, and for none, curves of decoding and of prompt tokens, layer by layer."""
    theirs = [curve_of(layer, rule) for layer, rule in enumerate(prompt)]
    return [
        list(Counter(zip(map(curve_of, range(layers), rules), theirs, strict=True)).items())
        for rules in (*(band.rules for band in bands), (Rule(),) * layers)
    ]
