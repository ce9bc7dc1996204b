"""By what experts are ranked, each criterion under its name with where it comes from.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError, did_you_mean
from leanmoe.prune.expert_statistics import ExpertStatistics

Scores = NDArray[np.float64]
PAPER = "arXiv 2505.03531"


@dataclass(frozen=True)
class Criterion:
    """A way to rank experts; the higher the score, the longer an expert stays."""

    name: str
    title: str
    source: str
    by_place: Callable[[int, int], Scores] | None = None
    """Scores [E] of a layer from the number of experts and a seed: no text needed."""
    by_statistics: Callable[[ExpertStatistics], Scores] | None = None
    """Scores [L,E]. With neither: by `output_error`, which needs the model itself."""

    @property
    def needs_text(self) -> bool:
        """Whether the model has to be run."""
        return self.by_place is None


def criterion(name: str) -> Criterion:
    """The criterion of that name; raises LeanMoeError, naming near ones, for an unknown one."""
    if name in CRITERIA:
        return CRITERIA[name]
    hint = did_you_mean(name, CRITERIA)
    raise LeanMoeError(f"criterion {name!r} is not known: {hint}known are {', '.join(CRITERIA)}")


def place_scores(found: Criterion, layers: int, experts: int, seed: int) -> Scores:
    """Scores [L,E] of a criterion that needs no text; layers differ where chance decides."""
    assert found.by_place is not None
    return np.stack([found.by_place(experts, seed + layer) for layer in range(layers)])


def _random(experts: int, seed: int) -> Scores:
    return np.random.default_rng(seed).random(experts)


def _first(experts: int, _seed: int) -> Scores:
    return -np.arange(experts, dtype=np.float64)


def _last(experts: int, _seed: int) -> Scores:
    return np.arange(experts, dtype=np.float64)


def _odd(experts: int, _seed: int) -> Scores:
    numbers = np.arange(experts)
    return (numbers % 2 * experts - numbers).astype(np.float64)


def _even(experts: int, _seed: int) -> Scores:
    numbers = np.arange(experts)
    return ((1 - numbers % 2) * experts - numbers).astype(np.float64)


def _mean_output(seen: ExpertStatistics) -> Scores:
    return seen.outputs_LE / np.maximum(seen.slots_LE, 1)


CRITERIA = {
    found.name: found
    for found in (
        Criterion("random", "drawn by lot", PAPER, by_place=_random),
        Criterion("odd", "odd numbers first", PAPER, by_place=_odd),
        Criterion("even", "even numbers first", PAPER, by_place=_even),
        Criterion("first-half", "the first numbers", PAPER, by_place=_first),
        Criterion("last-half", "the last numbers", PAPER, by_place=_last),
        Criterion(
            "activate-count", "how often used", PAPER, by_statistics=lambda seen: seen.slots_LE
        ),
        Criterion(
            "soft-count", "sum of routing weights", PAPER, by_statistics=lambda seen: seen.gates_LE
        ),
        Criterion(
            "reap",
            "mean of routing weight x output length over the tokens routed to it",
            "arXiv 2510.13999",
            by_statistics=_mean_output,
        ),
        Criterion(
            "easy-ep",
            "sum of routing weight x output length x how far the token turns",
            "arXiv 2504.06792",
            by_statistics=lambda seen: seen.changes_LE,
        ),
        Criterion(
            "output-sum",
            "sum of routing weight x output length: REAP without the mean",
            "ours",
            by_statistics=lambda seen: seen.outputs_LE,
        ),
        Criterion(
            "output-error", "greedily by the error of the layer's output", "arXiv 2402.14800"
        ),
    )
}
