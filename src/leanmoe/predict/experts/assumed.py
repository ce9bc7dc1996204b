"""How many experts a step activates, by its tokens, where routing is assumed.

Letters: E experts, k experts a token, B tokens in a step, G groups, N GPUs that share the experts.

Tokens that choose independently activate E(1-(1-k/E)^B) experts whether or not the router limits
groups: every expert is still among a token's k with chance k/E. What makes group limits activate
far fewer is that tokens of a step agree on their groups, as texts of one kind do. So a grouped
router is sampled with an `agreement` between the tokens: 0 is the plain formula, 1 is all tokens in
the same groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Rule
from leanmoe.predict.experts.curves import Curve, from_points
from leanmoe.predict.experts.sampled_steps import (
    SIZES,
    ActiveMeans,
    Choices,
    SampledDemand,
    SampledSteps,
    sample_demand,
    sample_logits,
    sampled_sizes,
)
from leanmoe.predict.experts.spread import ALONE, RankLayout

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
"""Tokens of a step that curves are computed at; between them they are interpolated."""


@dataclass(frozen=True)
class Assumed:
    """Routing where no trace is at hand."""

    skew: float = 0.0
    """Exponent of a power law over experts' popularity; 0 is even use."""
    agreement: float = 0.0
    """0 to 1: how far tokens of a step agree on the groups of a router that limits them."""

    def check(self) -> None:
        """Raises LeanMoeError for a value out of range."""
        if not 0 <= self.skew <= 4:
            raise LeanMoeError(f"skew is {self.skew:g}: it must be 0 to 4")
        if not 0 <= self.agreement <= 1:
            raise LeanMoeError(f"agreement is {self.agreement:g}: it must be 0 to 1")


def inclusion(experts: int, top_k: float, skew: float) -> NDArray[np.float64]:
    """Chance of each expert to be among a token's `top_k`, popularity rank^-skew; they sum to k.

    No chance is above 1: what is cut off goes to the other experts in proportion.
    """
    weight_E = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    chance_E = np.zeros(experts)
    free_E = np.ones(experts, dtype=bool)
    left = float(top_k)
    while True:
        share_E = np.where(free_E, weight_E * left / weight_E[free_E].sum(), 0.0)
        over_E = free_E & (share_E >= 1.0)
        if not over_E.any():
            return np.where(free_E, share_E, chance_E)
        chance_E[over_E] = 1.0
        free_E &= ~over_E
        left = top_k - chance_E.sum()
        if left <= 0 or not free_E.any():
            return chance_E


def assumed_curve(
    experts: int,
    top_k: int,
    rule: Rule,
    assumed: Assumed,
    groups: int = 1,
    groups_used: int = 1,
    scope: RankLayout = ALONE,
) -> Curve:
    """What a rule activates where tokens choose as assumed; all but thresholds, which need traces.

    `guaranteed` k0: the union of every token's best k0 is active, and a token fills up to its k
    from that of its batch scope, however far down its own ranking (OEA's algorithm 1). Steps under
    budgets are sampled (`sampled_steps`).
    """
    assumed.check()
    if rule.threshold is not None or rule.top_p is not None:
        name = "threshold" if rule.threshold is not None else "top_p"
        raise LeanMoeError(
            f"the plan sets {name}: what it activates depends on the text, so give a profile of "
            "the model (--profile), as leanmoe tune writes it"
        )
    kept = experts if rule.experts is None else len(rule.experts)
    slots = min(rule.top_k if rule.top_k is not None else top_k, kept)
    pool = Pool(kept, groups, groups_used)
    most: list[float] = []
    if rule.has_budget and slots:
        sampled_pool = pool if pool.is_limited else Pool(kept)
        found = [
            _sampled(sampled_pool, slots, rule, count, assumed, scope)
            for count in sampled_sizes(scope)
        ]
        points = [(tokens, each.distinct, each.slots) for tokens, each in found]
        most = [each.most_loaded for _, each in found]
    else:
        points = [_unlimited(pool, slots, rule, count, assumed, scope) for count in GRID]
    words = "modelled: independent tokens, even use"
    if assumed.skew:
        words = f"modelled: independent tokens, popularity as rank^-{assumed.skew:g}"
    if assumed.agreement and groups_used < groups:
        words += f", tokens agree on groups by {assumed.agreement:g} of 1"
    shares = rule.is_batch_aware
    if shares and scope.data > 1:
        words += f", batch scope {'all' if scope.cross_rank else 'rank'}"
    exchanges_demand = shares and scope.exchanges_demand
    return from_points(points, kept, words, slots, shares, most, exchanges_demand)


@dataclass(frozen=True)
class Pool:
    """The experts that tokens choose among, and the groups that each token is limited to."""

    experts: int
    groups: int = 1
    groups_used: int = 1

    @property
    def is_limited(self) -> bool:
        """Whether a token may use some groups only, and these divide the experts evenly."""
        return self.groups_used < self.groups and not self.experts % self.groups


def _unlimited(
    pool: Pool, slots: int, rule: Rule, count: int, assumed: Assumed, scope: RankLayout
) -> tuple[float, float, float]:
    """A curve's point without a budget, for so many tokens of a batch scope."""
    first = min(rule.guaranteed, slots) if rule.guaranteed is not None else slots
    ours = _active(pool, first, count, assumed)
    tokens = count * scope.scopes
    active = _active(pool, first, tokens, assumed)
    # Of the others' experts a token may use those of its groups; tokens that agree have the same.
    share = pool.groups_used / pool.groups
    reach = share + (1 - share) * assumed.agreement
    own = min(float(first), ours)
    used = max(1.0, own + (ours - own) * reach) if slots else 0.0
    return float(tokens), active, min(float(slots), used)


def _sampled(
    pool: Pool, slots: int, rule: Rule, count: int, assumed: Assumed, scope: RankLayout
) -> tuple[float, ActiveMeans]:
    """A curve's point under a budget, for so many tokens of a batch scope."""
    tokens = count * scope.scopes
    ranks = scope.ranks if rule.on(scope.ranks).budget_per_rank is not None else 1
    steps = _decided(pool, slots, rule.on(scope.ranks), tokens, assumed, scope.scopes, ranks)
    return float(tokens), steps.on(scope.ranks)


@cache
def _decided(
    pool: Pool, slots: int, rule: Rule, tokens: int, assumed: Assumed, scopes: int, ranks: int
) -> SampledSteps:
    """Steps are decided once for all numbers of ranks that decide alike."""
    return _demand(pool, slots, rule.guaranteed, tokens, assumed, scopes).decide(rule, ranks)


@lru_cache(maxsize=len(SIZES))
def _demand(
    pool: Pool, slots: int, guaranteed: int | None, tokens: int, assumed: Assumed, scopes: int
) -> SampledDemand:
    """What tokens ask for, for as many sizes as one curve has: it is large."""
    popularity_E = inclusion(pool.experts, slots, assumed.skew)
    choices = Choices(popularity_E, pool.groups, pool.groups_used, assumed.agreement)
    return sample_demand(choices, slots, guaranteed, tokens, scopes)


def _active(pool: Pool, top_k: int, tokens: int, assumed: Assumed) -> float:
    if top_k == 0:
        return 0.0
    if pool.is_limited and assumed.agreement > 0:
        return grouped_distinct(pool, top_k, tokens, assumed)
    if assumed.skew == 0:
        return distinct_uniform(pool.experts, top_k, tokens)
    chance_E = inclusion(pool.experts, top_k, assumed.skew)
    return float((1 - (1 - chance_E) ** tokens).sum())


@cache
def grouped_distinct(pool: Pool, top_k: int, tokens: int, assumed: Assumed, seed: int = 0) -> float:
    """Mean distinct experts of steps through a group-limited router, by drawing steps.

    Raises LeanMoeError where the groups do not hold so many.
    """
    if not pool.is_limited or top_k > pool.experts // pool.groups * pool.groups_used:
        raise LeanMoeError(
            f"{top_k} experts from {pool.groups_used} of {pool.groups} groups of {pool.experts} is "
            "not possible"
        )
    popularity_E = inclusion(pool.experts, top_k, assumed.skew)
    choices = Choices(popularity_E, pool.groups, pool.groups_used, assumed.agreement)
    active = []
    for logits_BTE, _ in sample_logits(choices, tokens, scopes=1, seed=seed):
        ids_BTK = np.argpartition(-logits_BTE, top_k - 1, axis=-1)[..., :top_k]
        active += [len(np.unique(ids_TK)) for ids_TK in ids_BTK]
    return float(np.mean(active))
