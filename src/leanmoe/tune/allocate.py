"""Which rule each layer gets: the least time for a given loss, by dynamic programming.

A multiple-choice knapsack: one option of every item is taken, losses add up to at most a budget,
and time is as small as it can be. Losses of single layers do not simply add in the real model, so
the plans that come out are candidates for validation, not results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leanmoe.errors import LeanMoeError

LOSS_STEPS = 2000
"""Losses are rounded up to this many parts of the budget: a plan may miss the budget by none and
the best loss by at most items/LOSS_STEPS of it."""


@dataclass(frozen=True)
class Option:
    """One way to set an item: what it costs in quality and in time."""

    loss: float
    time: float


def cheapest(items: Sequence[Sequence[Option]], budget: float) -> tuple[int, ...]:
    """The option of each item with the least total time whose losses add to at most `budget`.

    Losses below zero count as zero: what one layer seems to win is noise. Raises LeanMoeError
    when even the smallest losses are above the budget.
    """
    if budget < 0:
        raise LeanMoeError(f"loss budget is {budget}: it must not be negative")
    step = budget / LOSS_STEPS
    best_time = np.full(LOSS_STEPS + 1, np.inf)
    best_time[0] = 0.0
    taken: list[np.ndarray] = []
    for options in items:
        best_time, choice = _add(best_time, options, step)
        taken.append(choice)
    if not np.isfinite(best_time).any():
        raise LeanMoeError(
            f"no plan loses at most {budget:.4g}: every option of a layer loses more"
        )
    place = int(np.argmin(best_time))
    chosen = []
    for options, choice in zip(reversed(items), reversed(taken), strict=True):
        option = int(choice[place])
        chosen.append(option)
        place -= _steps(options[option].loss, step)
    return tuple(reversed(chosen))


def _add(
    best_time: np.ndarray, options: Sequence[Option], step: float
) -> tuple[np.ndarray, np.ndarray]:
    after = np.full_like(best_time, np.inf)
    choice = np.full(len(best_time), -1)
    for number, option in enumerate(options):
        cost = _steps(option.loss, step)
        if cost >= len(best_time):
            continue
        moved = np.full_like(best_time, np.inf)
        moved[cost:] = best_time[: len(best_time) - cost] + option.time
        better = moved < after
        after[better] = moved[better]
        choice[better] = number
    return after, choice


def _steps(loss: float, step: float) -> int:
    if loss <= 0:
        return 0
    return LOSS_STEPS + 1 if step == 0 else int(np.ceil(loss / step - 1e-9))
