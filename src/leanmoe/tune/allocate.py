"""Which rule each layer gets: every best trade of loss for time, by dynamic programming.

A multiple-choice knapsack: one option of every item is taken; losses add, times add. Losses of
single layers do not simply add in the real model, so what comes out are candidates to be refined
and validated, not results. "Time" is any cost that adds: seconds, experts a token, distinct
experts a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError

POINTS = 4096
"""Partial allocations kept after each item. Below that many the front is exact. Above, the range
of losses is cut into so many equal parts and the fastest of each part is kept: each item's thinning
may cost 1/POINTS of that range in loss, all together items/POINTS; losses and times that are
reported are never rounded."""
ROUNDING = 1e-9
"""Relative: a budget is kept if float sums exceed it by no more."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to set an item: what it costs in quality and in time."""

    loss: float
    time: float


@dataclass(frozen=True)
class Allocation:
    """One option for every item; no other allocation is better in both sums."""

    loss: float
    time: float
    chosen: tuple[int, ...]
    """The number of each item's option."""


def pareto(
    items: Sequence[Sequence[Option]], most_loss: float = float("inf"), points: int = POINTS
) -> tuple[Allocation, ...]:
    """All best allocations whose loss is at most `most_loss`, by rising loss and falling time.

    Losses below zero count as zero: what one layer seems to win is noise, and must not pay for
    what another one loses. Raises LeanMoeError when an option is not a number, or when even the
    smallest losses together are above `most_loss`.
    """
    allowed = most_loss * (1 + ROUNDING)
    loss_P, time_P = np.zeros(1), np.zeros(1)
    taken: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for item in items:
        option_loss, option_time = _arrays(item)
        all_loss = (loss_P[:, None] + option_loss[None, :]).ravel()
        all_time = (time_P[:, None] + option_time[None, :]).ravel()
        kept = _best(all_loss, all_time, allowed, points)
        if not len(kept):
            raise LeanMoeError(
                f"no plan loses at most {most_loss:.4g}: every option of a layer loses more"
            )
        loss_P, time_P = all_loss[kept], all_time[kept]
        taken.append((kept // len(item), kept % len(item)))
    return tuple(
        Allocation(float(loss_P[n]), float(time_P[n]), _chosen(taken, n))
        for n in range(len(loss_P))
    )


def cheapest(items: Sequence[Sequence[Option]], budget: float) -> tuple[int, ...]:
    """The option of each item with the least total time whose losses add to at most `budget`.

    Raises LeanMoeError when even the smallest losses are above the budget.
    """
    if budget < 0:
        raise LeanMoeError(f"loss budget is {budget}: it must not be negative")
    return pareto(items, budget)[-1].chosen


def _arrays(item: Sequence[Option]) -> tuple[Floats, Floats]:
    if not item:
        raise LeanMoeError("an item to allocate has no option")
    loss = np.array([option.loss for option in item], dtype=np.float64)
    time = np.array([option.time for option in item], dtype=np.float64)
    if not (np.isfinite(loss).all() and np.isfinite(time).all()):
        raise LeanMoeError("an option to allocate has a loss or a time that is not a finite number")
    return np.maximum(loss, 0.0), time


def _best(loss: Floats, time: Floats, allowed: float, points: int) -> NDArray[np.int64]:
    """Numbers of the allocations that none is better than, by rising loss, at most `points`."""
    order = np.lexsort((time, loss))
    order = order[loss[order] <= allowed]
    ordered = time[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    kept = order[ordered < before]
    if len(kept) <= points:
        return kept
    start, end = loss[kept[0]], loss[kept[-1]]
    part = np.floor((loss[kept] - start) / (end - start) * (points - 1))
    fastest_of_part = np.append(part[1:] != part[:-1], True)
    fastest_of_part[0] = True
    thinned: NDArray[np.int64] = kept[fastest_of_part]
    return thinned


def _chosen(
    taken: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], place: int
) -> tuple[int, ...]:
    chosen = []
    for before, option in reversed(taken):
        chosen.append(int(option[place]))
        place = int(before[place])
    return tuple(reversed(chosen))
