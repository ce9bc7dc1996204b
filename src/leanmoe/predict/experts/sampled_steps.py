"""Steps whose tokens choose at random, routed under a batch-aware rule.

`leanmoe.routing` decides, as in a running model: torch is imported when a step is routed.

Letters: Z sampled steps, B batches of tokens that are routed apart (a sampled step has one for
each batch scope), T tokens of a batch, E experts, G groups of experts, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.predict.experts.spread import ALONE, RankLayout

SAMPLED_TOKENS = 4096
"""Tokens sampled for each number of tokens in a step, at least."""
FEWEST_STEPS = 8
MOST_VALUES = 1 << 21
"""Logits that are sampled at once: tokens x experts."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Tokens of a batch scope at which curves are sampled."""
MOST_TOKENS = 4096
"""Tokens of a sampled step at most, unless its batch scopes have fewer than 8 tokens each."""
LEAST_WAIT = np.float32(1e-30)
"""The least exponential draw: 0 would be an infinite logit."""
Logits = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Choices:
    """How a router's tokens choose.

    An expert's logit is the logarithm of its popularity, which a random permutation assigns anew in
    each step, plus Gumbel noise. Each token uses some of the groups of experts.
    """

    popularity_E: NDArray[np.float64]
    groups: int = 1
    groups_used: int = 1
    agreement: float = 0.0
    """How far the tokens of a step agree on their groups, from 0 to 1."""

    @property
    def router(self) -> Router:
        """A softmax router that normalises, with these groups; logits outside of them are -inf."""
        return Router(
            normalise=True, groups=self.groups, groups_used=self.groups_used, group_score="max"
        )


@dataclass(frozen=True)
class ActiveMeans:
    """Means over sampled steps."""

    distinct: float
    most_loaded: float
    """Distinct experts of the rank that has the most of them active."""
    slots: float
    """Experts a token uses."""


@dataclass(frozen=True)
class SampledSteps:
    """Steps that were sampled and routed."""

    active_ZE: Bools
    """The experts that any batch scope of the step activates."""
    slots: float
    """Mean experts a token uses."""

    def on(self, ranks: int) -> ActiveMeans:
        """What the steps activate where the experts lie on `ranks` GPUs, in blocks."""
        placement = Placement.linear(self.active_ZE.shape[1], ranks)
        counts = [
            self.active_ZE[:, list(placement.experts_on(rank))].sum(axis=1) for rank in range(ranks)
        ]
        active_ZR = np.stack(counts, axis=1)
        distinct, most = active_ZR.sum(axis=1).mean(), active_ZR.max(axis=1).mean()
        return ActiveMeans(float(distinct), float(most), self.slots)


def sampled_sizes(layout: RankLayout) -> tuple[int, ...]:
    """Tokens of each batch scope at which a curve is sampled."""
    most = max(8, MOST_TOKENS // layout.scopes)
    return tuple(count for count in SIZES if count <= most)


def sample_steps(
    choices: Choices,
    slots: int,
    rule: Rule,
    tokens: int,
    layout: RankLayout = ALONE,
    seed: int = 0,
) -> SampledSteps:
    """Samples and routes steps of `tokens`, a multiple of the layout's batch scopes.

    `slots` are the most that a token uses. Where the experts are matters to `budget_per_rank`
    alone: under other rules the steps are the same for any number of ranks.
    """
    draw = np.random.default_rng(seed)
    scopes, experts = layout.scopes, len(choices.popularity_E)
    steps = max(FEWEST_STEPS, SAMPLED_TOKENS // tokens)
    placement = Placement.linear(experts, layout.ranks)
    active, used = [], []
    for count in _portions(steps, tokens * experts):
        logits_BTE = _logits(draw, choices, (count, scopes, tokens // scopes))
        active_BE, used_BT = route_steps(logits_BTE, choices.router, slots, rule, placement)
        active.append(active_BE.reshape(count, scopes, experts).any(axis=1))
        used.append(used_BT.reshape(count, -1).mean(axis=1))
    return SampledSteps(np.concatenate(active), float(np.concatenate(used).mean()))


def route_steps(
    logits_BTE: Logits, router: Router, slots: int, rule: Rule, placement: Placement
) -> tuple[Bools, NDArray[np.int64]]:
    """The experts (B,E) that each batch activates, and how many each token (B,T) uses.

    Of the rule only what makes it batch-aware counts: `slots` says how many experts a token uses
    at most, and the logits are those of the experts that remain.
    """
    import torch

    from leanmoe.routing import BatchScope, route

    logits = torch.from_numpy(logits_BTE)
    batches, _, experts = logits.shape
    rule = rule.on(placement.ranks)
    shared = Rule(
        guaranteed=rule.guaranteed, budget=rule.budget, budget_per_rank=rule.budget_per_rank
    )
    ids_BTK = route(logits, router, slots, shared, scope=BatchScope(placement)).ids_BTK
    active_BE = torch.zeros((batches, experts + 1), dtype=torch.bool)
    active_BE.scatter_(1, ids_BTK.flatten(1), True)
    return active_BE[:, :experts].numpy(), (ids_BTK < experts).sum(dim=-1).numpy()


def _logits(draw: np.random.Generator, choices: Choices, shape: tuple[int, int, int]) -> Logits:
    """Logits (B,T,E) of (steps, batch scopes, tokens): the scopes of a step share popularity."""
    steps, scopes, tokens = shape
    experts = len(choices.popularity_E)
    popularity_E = np.log(choices.popularity_E).astype(np.float32)
    popularity_ZE = draw.permuted(np.tile(popularity_E, (steps, 1)), axis=1)
    popularity_BE = np.repeat(popularity_ZE, scopes, axis=0)
    logits_BTE = popularity_BE[:, None] + _gumbel(draw, (steps * scopes, tokens, experts))
    if choices.groups_used == choices.groups:
        return logits_BTE
    common_ZG = draw.standard_normal((steps, choices.groups))
    common_BG = np.repeat(common_ZG, scopes, axis=0)
    own_BTG = draw.standard_normal((steps * scopes, tokens, choices.groups))
    shared, apart = math.sqrt(choices.agreement), math.sqrt(1 - choices.agreement)
    score_BTG = shared * common_BG[:, None] + apart * own_BTG
    places_BTG = np.argsort(np.argsort(-score_BTG, axis=-1), axis=-1)
    allowed_BTE = np.repeat(places_BTG < choices.groups_used, experts // choices.groups, axis=-1)
    return np.where(allowed_BTE, logits_BTE, np.float32(-np.inf))


def _gumbel(draw: np.random.Generator, shape: tuple[int, ...]) -> Logits:
    """Gumbel noise, in a third of the time that numpy's own takes."""
    waits = draw.standard_exponential(shape, dtype=np.float32)
    return np.asarray(-np.log(np.maximum(waits, LEAST_WAIT)))


def _portions(steps: int, values: int) -> Iterator[int]:
    """The steps in portions that fit in memory, where each step has so many values."""
    most = max(1, MOST_VALUES // values)
    while steps > 0:
        yield min(most, steps)
        steps -= most
