"""Steps whose tokens choose at random, under rules by which they share experts. Needs no torch.

`guaranteed`, `budget` and `budget_per_rank` decide as `leanmoe.routing` has it: the same ballot,
counted here for whole steps at once.

Letters: S steps, C companies of a step, T tokens of a company, E experts, K slots a token, G groups
of experts, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.predict.experts.spread import ALONE, RankLayout

DRAWN_TOKENS = 4096
"""Tokens drawn for each number of tokens in a step, at least."""


MOST_VALUES = 1 << 21
"""Drawn at once: tokens x experts."""


DRAWN_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Tokens of a company at which curves are drawn."""


MOST_DRAWN = 4096
"""Tokens of all of a step's companies that are drawn at most, but that each has up to 8."""


LEAST_WAIT = np.float32(1e-30)
"""An exponential draw of 0 would be an infinite logit."""


Floats = NDArray[np.float64]


Logits = NDArray[np.floating[Any]]


Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Choices:
    """How a router's tokens choose: an expert's logit is the logarithm of its popularity, a
    random permutation in each step, and Gumbel noise; they are all in some of its groups."""

    popularity_E: Floats
    groups: int = 1
    groups_used: int = 1
    agreement: float = 0.0
    """0 to 1: how far tokens of a step agree on their groups."""


@dataclass(frozen=True)
class Drawn:
    """Means over the steps."""

    distinct: float
    most_loaded: float
    """Distinct experts of the rank that wakes the most."""
    slots: float
    """Experts a token uses."""


@dataclass(frozen=True)
class Steps:
    """Drawn steps, decided."""

    active_SE: Bools
    """The experts that any company wakes."""
    slots: float
    """Experts a token uses, mean."""

    def on(self, ranks: int) -> Drawn:
        """What they activate where the experts lie on so many GPUs, in blocks."""
        placement = Placement.linear(self.active_SE.shape[1], ranks)
        active_SR = _by_rank(self.active_SE, placement)
        distinct, most = active_SR.sum(axis=1).mean(), active_SR.max(axis=1).mean()
        return Drawn(float(distinct), float(most), self.slots)


def drawn(
    choices: Choices, slots: int, rule: Rule, tokens: int, scope: RankLayout = ALONE, seed: int = 0
) -> Drawn:
    """What steps of `tokens`, a multiple of the companies, activate under a rule.

    `slots` are the most that a token uses; `rule` is one that shares experts.
    """
    return decided(choices, slots, rule, tokens, scope, seed).on(scope.ranks)


def decided(
    choices: Choices, slots: int, rule: Rule, tokens: int, scope: RankLayout = ALONE, seed: int = 0
) -> Steps:
    """As `drawn`, before anybody counts by GPU.

    Where the experts are matters to `budget_per_rank` alone: under other rules the steps are the
    same for any number of ranks.
    """
    draw = np.random.default_rng(seed)
    steps = max(8, DRAWN_TOKENS // tokens)
    kept = len(choices.popularity_E)
    placement = Placement.linear(kept, scope.ranks)
    active, used = [], []
    for count in _portions(steps, tokens * kept):
        logits_SCTE = _logits(draw, choices, (count, scope.companies, tokens // scope.companies))
        active_SCE, slots_SCT = shared(logits_SCTE, slots, rule, placement)
        active.append(active_SCE.any(axis=1))
        used.append(slots_SCT.mean(axis=(1, 2)))
    return Steps(np.concatenate(active), float(np.concatenate(used).mean()))


def drawn_at(scope: RankLayout) -> tuple[int, ...]:
    """Tokens of each company at which a curve is drawn."""
    most = max(8, MOST_DRAWN // scope.companies)
    return tuple(count for count in DRAWN_AT if count <= most)


def shared(
    logits_SCTE: Logits, slots: int, rule: Rule, placement: Placement
) -> tuple[Bools, NDArray[np.int64]]:
    """The experts that each company wakes (S,C,E), and how many each token uses (S,C,T).

    A token may use the experts whose logit is above -inf. It votes with the softmax of its best
    `slots` logits, and fills up to as many from all awake experts.
    """
    rule = rule.on(placement.ranks)
    order_SCTK = _best_first(logits_SCTE, slots)
    picked_SCTK = np.take_along_axis(logits_SCTE, order_SCTK, axis=-1)
    best_SCE = _count(order_SCTK[..., :1], logits_SCTE.shape) > 0
    guaranteed_SCE = _count(order_SCTK[..., : rule.guaranteed], logits_SCTE.shape) > 0
    active_SCE = guaranteed_SCE
    if rule.has_budget:
        gates_SCTK = np.exp(picked_SCTK - picked_SCTK[..., :1])
        gates_SCTK /= gates_SCTK.sum(axis=-1, keepdims=True)
        votes_SCE = _count(order_SCTK, logits_SCTE.shape, gates_SCTK) * guaranteed_SCE
        active_SCE = _within_budgets(votes_SCE, best_SCE, rule, placement)
    usable_SCTE = active_SCE[:, :, None, :] & np.isfinite(logits_SCTE)
    return active_SCE, np.minimum(usable_SCTE.sum(axis=-1), slots)


def _best_first(logits_SCTE: Logits, slots: int) -> NDArray[np.int64]:
    """The `slots` experts of each token with the highest logits, the highest first."""
    some_SCTK = np.argpartition(-logits_SCTE, slots - 1, axis=-1)[..., :slots]
    logits_SCTK = np.take_along_axis(logits_SCTE, some_SCTK, axis=-1)
    return np.take_along_axis(some_SCTK, np.argsort(-logits_SCTK, axis=-1), axis=-1)


def _within_budgets(votes_SCE: Floats, best_SCE: Bools, rule: Rule, placement: Placement) -> Bools:
    """Every token's best, then whatever has the most votes: first within each rank, then in all."""
    order_SCE = np.where(best_SCE, np.inf, np.where(votes_SCE > 0, votes_SCE, -np.inf))
    if rule.budget_per_rank is not None:
        for rank in range(placement.ranks):
            mine = list(placement.experts_on(rank))
            first = _first(order_SCE[..., mine], rule.budget_per_rank)
            order_SCE[..., mine] = np.where(first, order_SCE[..., mine], -np.inf)
        order_SCE[best_SCE] = np.inf
    if rule.budget is not None:
        order_SCE = np.where(_first(order_SCE, rule.budget) | best_SCE, order_SCE, -np.inf)
    return np.asarray(order_SCE > -np.inf)


def _first(order_SCE: Floats, count: int) -> Bools:
    """The `count` highest; the lower id first among equals."""
    places = np.argsort(np.argsort(-order_SCE, axis=-1, kind="stable"), axis=-1)
    return np.asarray(places < count)


def _count(
    ids_SCTK: NDArray[np.int64], shape: tuple[int, ...], values_SCTK: Floats | None = None
) -> Floats:
    """How often, or with how much in all, each company names each expert (S,C,E)."""
    steps, companies, _, experts = shape
    offset_SC = np.arange(steps * companies).reshape(steps, companies, 1, 1) * experts
    values = None if values_SCTK is None else values_SCTK.ravel()
    found = np.bincount((ids_SCTK + offset_SC).ravel(), values, steps * companies * experts)
    return np.asarray(found, dtype=np.float64).reshape(steps, companies, experts)


def _by_rank(active_SE: Bools, placement: Placement) -> NDArray[np.int64]:
    counts = [
        active_SE[:, list(placement.experts_on(rank))].sum(axis=1)
        for rank in range(placement.ranks)
    ]
    return np.stack(counts, axis=1)


def _logits(draw: np.random.Generator, choices: Choices, shape: tuple[int, int, int]) -> Logits:
    """Logits (S,C,T,E) of steps whose experts are popular in an order of their own."""
    steps, experts = shape[0], len(choices.popularity_E)
    popularity_E = np.log(choices.popularity_E).astype(np.float32)
    popularity_SE = draw.permuted(np.tile(popularity_E, (steps, 1)), axis=1)
    logits_SCTE = popularity_SE[:, None, None, :] + _gumbel(draw, (*shape, experts))
    if choices.groups_used == choices.groups:
        return logits_SCTE
    common_SG = draw.standard_normal((steps, 1, 1, choices.groups))
    own_SCTG = draw.standard_normal((*shape, choices.groups))
    score_SCTG = (
        math.sqrt(choices.agreement) * common_SG + math.sqrt(1 - choices.agreement) * own_SCTG
    )
    places_SCTG = np.argsort(np.argsort(-score_SCTG, axis=-1), axis=-1)
    allowed_SCTE = np.repeat(places_SCTG < choices.groups_used, experts // choices.groups, axis=-1)
    return np.where(allowed_SCTE, logits_SCTE, np.float32(-np.inf))


def _gumbel(draw: np.random.Generator, shape: tuple[int, ...]) -> Logits:
    """Gumbel noise, a third of the time that numpy's own takes."""
    waits = draw.standard_exponential(shape, dtype=np.float32)
    return np.asarray(-np.log(np.maximum(waits, LEAST_WAIT)))


def _portions(steps: int, values: int) -> Iterator[int]:
    """So many steps in portions that fit in memory, each step with so many values."""
    most = max(1, MOST_VALUES // values)
    while steps > 0:
        yield min(most, steps)
        steps -= most
