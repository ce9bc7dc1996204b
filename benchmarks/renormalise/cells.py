"""The two tests of the plan, cell by cell, corrected by Holm. Shape suffix: U documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
BETWEEN = ("0.25", "0.5", "0.75")
KEPT, ANEW = "0.0", "1.0"


@dataclass(frozen=True)
class Cell:
    """A router with or without shared expert under one rule; figures by seed."""

    model: str
    rule: str
    kept_less_anew: tuple[float, ...]
    """Relative to the full model's loss: below 0, kept weights lose less."""
    p_kept: float
    between_less_end: tuple[tuple[float, float], ...]
    """The value chosen on one half of the documents, and what it loses less than the better end
    on the other half."""
    p_between: float

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def cells_of(models: Sequence[dict[str, Any]]) -> list[Cell]:
    """Every cell of the models, p-values corrected over all cells."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        shared = "shared expert" if model["shared_experts"] else "none shared"
        by_model.setdefault(f"{model['router']}, {shared}", []).append(model)
    cells = [
        _cell(name, rule, seeds) for name, seeds in by_model.items() for rule in seeds[0]["loss"]
    ]
    kept = holm([cell.p_kept for cell in cells])
    between = holm([cell.p_between for cell in cells])
    return [
        replace(cell, p_kept=p, p_between=q)
        for cell, p, q in zip(cells, kept, between, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): what is at most alpha holds with all others at alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _cell(name: str, rule: str, seeds: Sequence[dict[str, Any]]) -> Cell:
    kept = [_difference(seed, rule, KEPT, ANEW, slice(None), two_sided) for seed in seeds]
    between = [_between(seed, rule) for seed in seeds]
    # A statement must hold for every seed, in the same direction.
    agree = len({np.sign(mean) for mean, _ in kept}) == 1
    return Cell(
        name,
        rule,
        tuple(mean for mean, _ in kept),
        max(p for _, p in kept) if agree else 1.0,
        tuple((a, mean) for a, mean, _ in between),
        max(p for _, _, p in between),
    )


def _between(seed: dict[str, Any], rule: str) -> tuple[float, float, float]:
    chosen_on, tested_on = slice(0, None, 2), slice(1, None, 2)

    def summed(a: str) -> float:
        return float(np.asarray(seed["loss"][rule][a])[chosen_on].sum())

    best, end = min(BETWEEN, key=summed), min((KEPT, ANEW), key=summed)
    return float(best), *_difference(seed, rule, best, end, tested_on, one_sided)


def two_sided(change_U: Floats) -> float:
    """The p-value of a mean that is not 0."""
    return float(stats.ttest_1samp(change_U, 0.0).pvalue)


def one_sided(change_U: Floats) -> float:
    """The p-value of a mean below 0."""
    return float(stats.ttest_1samp(change_U, 0.0, alternative="less").pvalue)


def _difference(
    seed: dict[str, Any],
    rule: str,
    first: str,
    second: str,
    part: slice,
    test: Callable[[Floats], float],
) -> tuple[float, float]:
    """How much more `first` loses than `second`, relative to the full model, and its p-value."""
    lost = seed["loss"][rule]
    change_U = (np.asarray(lost[first]) - np.asarray(lost[second]))[part]
    return float(change_U.sum() / np.asarray(seed["full"])[part].sum()), test(change_U)
