"""Steps whose tokens choose at random, routed under a batch-aware rule.

`leanmoe.routing` decides, as in a running model: torch is imported when a step is sampled. What
tokens ask for is sampled once for all numbers of ranks that the experts may lie on.

Letters: Z sampled steps, B batches of tokens that are routed apart (a sampled step has one for
each batch scope), T tokens of a batch, E experts, G groups of experts, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.predict.experts.spread import RankLayout

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_TOKENS = 4096
"""Tokens sampled for each number of tokens in a step, at least."""
FEWEST_STEPS = 8
MOST_VALUES = 1 << 21
"""Logits of a portion of steps: tokens x experts."""
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


@dataclass(frozen=True)
class SampledDemand:
    """What the tokens of sampled steps ask for, which is the same wherever the experts are."""

    demand_B3E: Tensor
    """Each batch's demand, in the rows of `routing.count_demand`."""
    usable_BTG: Tensor | None
    """The groups that a token may use; None for all."""
    steps: int
    slots: int
    """The most experts that a token uses."""

    def decide(self, rule: Rule, ranks: int = 1) -> SampledSteps:
        """The steps where the rule decides on so many ranks, which hold the experts in blocks.

        A token fills its slots with the active experts that it may use, as `routing.route` has it.
        """
        from leanmoe.routing.batch_rules import select_active_experts

        placement = Placement.linear(self.demand_B3E.shape[-1], ranks)
        active_BE, _ = select_active_experts(self.demand_B3E, rule.on(ranks), placement)
        if self.usable_BTG is None:
            filled_BT = active_BE.sum(dim=-1, keepdim=True)
        else:
            groups = self.usable_BTG.shape[-1]
            active_BG1 = (
                active_BE.reshape(len(active_BE), groups, -1).sum(dim=-1).float().unsqueeze(-1)
            )
            filled_BT = (self.usable_BTG.float() @ active_BG1).squeeze(-1).long()
        used_ZX = filled_BT.clamp(max=self.slots).numpy().reshape(self.steps, -1)
        active_ZXE = active_BE.numpy().reshape(self.steps, -1, active_BE.shape[-1])
        return SampledSteps(np.asarray(active_ZXE.any(axis=1)), float(used_ZX.mean(axis=1).mean()))


def sample_demand(
    choices: Choices, slots: int, guaranteed: int | None, tokens: int, scopes: int, seed: int = 0
) -> SampledDemand:
    """Samples steps of `tokens` in so many batch scopes, and what they ask for."""
    import torch

    demands, usable = [], []
    for logits_BTE, may_use_BTG in sample_logits(choices, tokens, scopes, seed):
        demands.append(ask(logits_BTE, choices.router, slots, guaranteed))
        usable += [] if may_use_BTG is None else [torch.from_numpy(may_use_BTG)]
    demand_B3E = torch.cat(demands)
    usable_BTG = torch.cat(usable) if usable else None
    return SampledDemand(demand_B3E, usable_BTG, len(demand_B3E) // scopes, slots)


def ask(logits_BTE: Logits, router: Router, slots: int, guaranteed: int | None = None) -> Tensor:
    """What each batch's tokens ask for (B,3,E) under a budget of any size.

    `slots` says how many experts a token uses at most; the logits are those of the experts that
    remain. `routing.route` tells it as it tells it to other ranks.
    """
    import torch

    from leanmoe.routing import BatchScope, route

    told: list[Tensor] = []

    def listen(demand_B3E: Tensor) -> Tensor:
        told.append(demand_B3E)
        return demand_B3E

    any_budget = Rule(guaranteed=guaranteed, budget=logits_BTE.shape[-1])
    route(torch.from_numpy(logits_BTE), router, slots, any_budget, scope=BatchScope(None, listen))
    return told[0]


def sample_logits(
    choices: Choices, tokens: int, scopes: int, seed: int
) -> Iterator[tuple[Logits, Bools | None]]:
    """Logits (B,T,E) of steps of `tokens` in so many batch scopes, and the groups (B,T,G) that a
    token may use; in portions that fit in memory."""
    draw = np.random.default_rng(seed)
    left = max(FEWEST_STEPS, SAMPLED_TOKENS // tokens)
    most = max(1, MOST_VALUES // (tokens * len(choices.popularity_E)))
    while left > 0:
        yield _logits(draw, choices, (min(most, left), scopes, tokens // scopes))
        left -= most


def _logits(
    draw: np.random.Generator, choices: Choices, shape: tuple[int, int, int]
) -> tuple[Logits, Bools | None]:
    """Logits (B,T,E) of (steps, batch scopes, tokens), and the groups (B,T,G) a token may use.

    The scopes of a step share popularity.
    """
    steps, scopes, tokens = shape
    experts = len(choices.popularity_E)
    popularity_E = np.log(choices.popularity_E).astype(np.float32)
    popularity_ZE = draw.permuted(np.tile(popularity_E, (steps, 1)), axis=1)
    popularity_BE = np.repeat(popularity_ZE, scopes, axis=0)
    logits_BTE = popularity_BE[:, None] + _gumbel(draw, (steps * scopes, tokens, experts))
    if choices.groups_used == choices.groups:
        return logits_BTE, None
    common_ZG = draw.standard_normal((steps, choices.groups))
    common_BG = np.repeat(common_ZG, scopes, axis=0)
    own_BTG = draw.standard_normal((steps * scopes, tokens, choices.groups))
    shared, apart = math.sqrt(choices.agreement), math.sqrt(1 - choices.agreement)
    score_BTG = shared * common_BG[:, None] + apart * own_BTG
    places_BTG = np.argsort(np.argsort(-score_BTG, axis=-1), axis=-1)
    usable_BTG = places_BTG < choices.groups_used
    usable_BTE = np.repeat(usable_BTG, experts // choices.groups, axis=-1)
    return np.where(usable_BTE, logits_BTE, np.float32(-np.inf)), usable_BTG


def _gumbel(draw: np.random.Generator, shape: tuple[int, ...]) -> Logits:
    """Gumbel noise, in a third of the time that numpy's own takes."""
    waits = draw.standard_exponential(shape, dtype=np.float32)
    return np.asarray(-np.log(np.maximum(waits, LEAST_WAIT)))
