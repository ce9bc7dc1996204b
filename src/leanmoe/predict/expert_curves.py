"""How many experts a step wakes, by its tokens: from traces that were replayed, or assumed.

Letters: E experts, k experts a token, B tokens in a step, G groups, N GPUs that share the experts.

Tokens that choose independently wake E(1-(1-k/E)^B) experts whether or not the router limits
groups: every expert is still among a token's k with chance k/E. What makes group limits wake far
fewer is that tokens of a step agree on their groups, as texts of one kind do. So a grouped router
is drawn with an `agreement` between the tokens: 0 is the plain formula, 1 is all tokens in the same
groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Rule
from leanmoe.predict.sampled_steps import (
    ALONE,
    DRAWN_TOKENS,
    BatchScope,
    Choices,
    Drawn,
    Steps,
    decided,
    drawn_at,
)

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
"""Tokens of a step that curves are computed at; between them they are interpolated."""


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
    is_told: bool = False
    """Whether data-parallel ranks tell each other what their tokens choose."""

    def at(self, tokens: float) -> tuple[float, float]:
        """Distinct experts and mean slots a token in a step of so many tokens.

        Interpolated over the logarithm of tokens. Beyond the last point the rest of the experts
        wakes as independent tokens would wake it.
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
    scope: BatchScope = ALONE,
) -> Curve:
    """What a rule activates where tokens choose as assumed; all but thresholds, which need traces.

    `guaranteed` k0: the union of every token's best k0 is awake, and a token fills up to its k
    from that of its company, however far down its own ranking (OEA's algorithm 1). Budgets are
    drawn (`drawing`).
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
    pool = _Pool(kept, groups, groups_used)
    most: list[float] = []
    if rule.has_budget and slots:
        drawn_of = pool if pool.is_limited else _Pool(kept)
        found = [_drawn(drawn_of, slots, rule, count, assumed, scope) for count in drawn_at(scope)]
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
        words += f", company {'all' if scope.cross_rank else 'rank'}"
    is_told = shares and scope.is_told
    return from_points(points, kept, words, slots, shares, most, is_told)


@dataclass(frozen=True)
class _Pool:
    """The experts that tokens choose among, and the groups that each token is limited to."""

    experts: int
    groups: int = 1
    groups_used: int = 1

    @property
    def is_limited(self) -> bool:
        """Whether a token may use some groups only, and these divide the experts evenly."""
        return self.groups_used < self.groups and not self.experts % self.groups


def _unlimited(
    pool: _Pool, slots: int, rule: Rule, count: int, assumed: Assumed, scope: BatchScope
) -> tuple[float, float, float]:
    """A curve's point without a budget, for so many tokens of a company."""
    first = min(rule.guaranteed, slots) if rule.guaranteed is not None else slots
    ours = _active(pool, first, count, assumed)
    tokens = count * scope.companies
    active = _active(pool, first, tokens, assumed)
    # Of the others' experts a token may use those of its groups; tokens that agree have the same.
    share = pool.groups_used / pool.groups
    reach = share + (1 - share) * assumed.agreement
    own = min(float(first), ours)
    used = max(1.0, own + (ours - own) * reach) if slots else 0.0
    return float(tokens), active, min(float(slots), used)


def _drawn(
    pool: _Pool, slots: int, rule: Rule, count: int, assumed: Assumed, scope: BatchScope
) -> tuple[float, Drawn]:
    """A curve's point under a budget, for so many tokens of a company."""
    tokens, rule = count * scope.companies, rule.on(scope.ranks)
    deciding = scope if rule.budget_per_rank is not None else replace(scope, ranks=1)
    steps = _decided(pool, slots, rule, tokens, assumed, deciding)
    return float(tokens), steps.on(scope.ranks)


@cache
def _decided(
    pool: _Pool, slots: int, rule: Rule, tokens: int, assumed: Assumed, scope: BatchScope
) -> Steps:
    """Drawn once for all numbers of ranks that decide alike."""
    popularity_E = inclusion(pool.experts, slots, assumed.skew)
    choices = Choices(popularity_E, pool.groups, pool.groups_used, assumed.agreement)
    return decided(choices, slots, rule, tokens, scope)


def _active(pool: _Pool, top_k: int, tokens: int, assumed: Assumed) -> float:
    if top_k == 0:
        return 0.0
    if pool.is_limited and assumed.agreement > 0:
        return grouped_distinct(
            pool.experts,
            top_k,
            tokens,
            pool.groups,
            pool.groups_used,
            assumed.agreement,
            assumed.skew,
        )
    if assumed.skew == 0:
        return distinct_uniform(pool.experts, top_k, tokens)
    chance_E = inclusion(pool.experts, top_k, assumed.skew)
    return float((1 - (1 - chance_E) ** tokens).sum())


@cache
def grouped_distinct(
    experts: int,
    top_k: int,
    tokens: int,
    groups: int,
    groups_used: int,
    agreement: float,
    skew: float = 0.0,
    seed: int = 0,
) -> float:
    """Mean distinct experts of steps through a group-limited router, by drawing steps.

    A token's best groups are ranked by sqrt(agreement) x the step's own draw + sqrt(1 - agreement)
    x the token's own, both standard normal; it then takes `top_k` experts of them at random, by
    popularity. Raises LeanMoeError where the groups do not hold so many.
    """
    size = experts // groups
    if experts % groups or not 1 <= groups_used <= groups or top_k > size * groups_used:
        raise LeanMoeError(
            f"{top_k} experts from {groups_used} of {groups} groups of {experts} is not possible"
        )
    draw = np.random.default_rng(seed)
    steps = max(8, DRAWN_TOKENS // tokens)
    chance_E = inclusion(experts, top_k, skew) if skew else np.ones(experts)
    popularity_E = np.log(draw.permutation(chance_E))
    total = 0
    for _ in range(steps):
        shared_G, own_BG = draw.standard_normal(groups), draw.standard_normal((tokens, groups))
        score_BG = math.sqrt(agreement) * shared_G + math.sqrt(1 - agreement) * own_BG
        used_BU = np.argpartition(-score_BG, groups_used - 1, axis=1)[:, :groups_used]
        allowed_BG = np.zeros((tokens, groups), dtype=bool)
        np.put_along_axis(allowed_BG, used_BU, True, axis=1)
        # Gumbel noise on log-popularity draws without replacement, in proportion to popularity.
        score_BE = popularity_E + draw.gumbel(size=(tokens, experts))
        score_BE = np.where(np.repeat(allowed_BG, size, axis=1), score_BE, -np.inf)
        chosen_BK = np.argpartition(-score_BE, top_k - 1, axis=1)[:, :top_k]
        total += len(np.unique(chosen_BK))
    return total / steps


@dataclass(frozen=True)
class Share:
    """What the most loaded of the GPUs that share the experts has to do."""

    rows: float
    distinct: float


def busiest(
    distinct: float, rows: float, experts: int, ranks: int, counted: float | None = None
) -> Share:
    """Rows and distinct experts of the most loaded of `ranks` GPUs with `experts` / `ranks` each.

    Experts lie at random, so loads of ranks are near normal: of N normals the largest is, on
    average, the quantile (N - 3/8) / (N + 1/4) (Blom). Which experts are awake is drawn without
    replacement, rows fall on ranks independently. `counted` are the distinct experts of the most
    loaded GPU where they are known.
    """
    if ranks == 1 or distinct <= 0:
        return Share(rows, distinct)
    here = experts / ranks
    share = min(distinct / experts, 1.0)
    above = _largest_of(ranks)
    spread = math.sqrt(max(here * share * (1 - share) * (experts - here) / max(experts - 1, 1), 0))
    most = min(here, distinct, max(distinct / ranks + above * spread, 1.0))
    most = most if counted is None else min(here, counted)
    load = rows / ranks + above * math.sqrt(rows / ranks * (1 - 1 / ranks))
    return Share(min(rows, max(load, most)), most)


@cache
def _largest_of(count: int) -> float:
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def ranks_touched(experts: int, slots: float, ranks: int, groups: int, groups_used: int) -> float:
    """Mean GPUs that a token's experts lie on: each one's activations travel there once.

    Independent choice without replacement: N(1 - C(E - E/N, k)/C(E, k)); with limited groups, over
    the ranks of the groups used (groups lie on whole ranks, as DeepSeek-V3 places them).
    """
    if ranks == 1:
        return 1.0
    share = groups_used / groups if groups_used < groups else 1.0
    pool, reachable = experts * share, max(1.0, ranks * share)
    here = pool / reachable
    missed = 1.0
    for taken in range(math.floor(slots)):
        missed *= max(0.0, (pool - here - taken) / (pool - taken))
    rest = slots - math.floor(slots)
    if rest:
        missed *= 1 - rest * here / max(pool - math.floor(slots), here)
    return reachable * (1 - missed)


def from_points(
    points: Sequence[tuple[float, float, float]],
    experts: int,
    origin: str,
    columns: float = 0.0,
    is_shared: bool = False,
    most_loaded: Sequence[float] = (),
    is_told: bool = False,
) -> Curve:
    """A curve from (tokens, distinct, slots), as replayed traces give them.

    `most_loaded` are the distinct experts of the most loaded GPU at each of these points.
    """
    if not points:
        raise LeanMoeError("a curve of distinct experts needs at least one point")
    tokens, distinct, slots = zip(*sorted(points), strict=True)
    most = tuple(value for _, value in sorted(zip(points, most_loaded, strict=bool(most_loaded))))
    columns_of = (origin, experts, columns, is_shared, most, is_told)
    return Curve(tuple(tokens), tuple(distinct), tuple(slots), *columns_of)
