"""How experts spread over ranks: the most loaded GPU, and the GPUs of a token's experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist


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
    average, the quantile (N - 3/8) / (N + 1/4) (Blom). Which experts are active is random without
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


@dataclass(frozen=True)
class RankLayout:
    """Whose tokens a rule sees in a step, and where the experts are."""

    ranks: int = 1
    """GPUs that hold whole experts, in blocks (vLLM's default)."""
    data: int = 1
    """Data-parallel ranks that the step's tokens are from, evenly."""
    cross_rank: bool = False
    """Whether tokens share experts with those of all data-parallel ranks
    (`LEANMOE_BATCH_SCOPE=all`), or with those of their own."""

    @property
    def scopes(self) -> int:
        """Groups of a step's tokens that decide each for themselves."""
        return 1 if self.cross_rank else self.data

    @property
    def exchanges_demand(self) -> bool:
        """Whether ranks tell each other what their tokens choose."""
        return self.cross_rank and self.data > 1


ALONE = RankLayout()
"""One GPU, or tensor parallelism: all tokens and all experts."""
