"""Which experts a whole step may activate: `guaranteed` and the budgets.

First the step's tokens state their demand for each expert, then the demand alone decides. Demand
adds up: the sum over several ranks is that of all their tokens, and each rank decides the same.

Slots come best first; `kept` is False for slots without demand (padding, or dropped by threshold
or top_p), and None where every slot counts. R ranks; L here counts the experts of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing.scores import lower_first

BEST, GUARANTEED, VOTES = range(3)
"""Rows of the demand (B,3,E), int64: tokens that must have an expert (whose best it is), tokens
that guarantee it, and the sum of its votes."""
_UNIT = 1 << 32
"""Votes are added as whole numbers of 1/_UNIT: the order of the tokens cannot change a sum."""
_BEST = 1 << 62
"""Above every expert's votes: _UNIT x tokens x experts."""


@dataclass(frozen=True)
class BatchScope:
    """Whose tokens a batch-aware rule counts, and which rank holds each expert."""

    placement: Placement | None = None
    """None: one rank has all experts."""
    exchange: Callable[[Tensor], Tensor] | None = None
    """Adds up the demand (B,3,E) of all ranks' tokens; it is called in each step, also in one
    without tokens. None: the step's own tokens are all there are."""

    @property
    def ranks(self) -> int:
        """Ranks that the experts are spread over."""
        return 1 if self.placement is None else self.placement.ranks


ALONE = BatchScope()
"""One process, all tokens and all experts in it."""


def count_demand(
    ids_BTK: Tensor,
    kept_BTK: Tensor | None,
    experts: int,
    guaranteed: int | None = None,
    votes_BTK: Tensor | None = None,
    must: int = 1,
) -> Tensor:
    """The demand (B,3,E) of a step's tokens, with the rows `BEST`, `GUARANTEED` and `VOTES`.

    `must` of a token's first slots count as its best. `votes_BTK`, 0 to 1, are how much a slot
    matters to its token. Rows that are not asked for stay 0: the shape is the same for any rule,
    and for no tokens.
    """
    demand_B3E = ids_BTK.new_zeros((*ids_BTK.shape[:-2], 3, experts))
    count_BTK = torch.ones_like(ids_BTK) if kept_BTK is None else kept_BTK.long()

    def add(row: int, slots: int, values_BTK: Tensor) -> None:
        ids_BX, values_BX = (x[..., :slots].flatten(-2) for x in (ids_BTK, values_BTK))
        demand_B3E[..., row, :].scatter_add_(-1, ids_BX, values_BX)

    add(BEST, must, count_BTK)
    if guaranteed is not None:
        add(GUARANTEED, guaranteed, count_BTK)
    if votes_BTK is not None:
        whole_BTK = (votes_BTK.float() * _UNIT).long() + 1  # a slot counts, however small its gate
        add(VOTES, ids_BTK.shape[-1], whole_BTK.masked_fill(count_BTK == 0, 0))
    return demand_B3E


def select_active_experts(
    demand_B3E: Tensor, rule: Rule, placement: Placement | None = None, zero_experts: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The experts (B,E) that a step may activate, and (B) whether a budget is too small for it.

    `guaranteed` activates what some token guarantees: phase 1 of OEA (arXiv 2511.02237, algorithm
    1). A token fills its other slots from these (phase 2, in `route`).

    `budget` and `budget_per_rank` activate greedily by the sum of an expert's votes (XShare, arXiv
    2602.07265; Lynx, arXiv 2411.08982), after every token's best, which always stays; an expert
    whose rank is full is passed over. Where the bests alone exceed a budget, in all or on a rank,
    they alone are active there, and the second result says so. Equal sums: the lower id first. An
    expert without a vote is never active, so fewer than the budget may be.

    With both kinds the guaranteed experts are the candidates, and the budget prevails.

    The last `zero_experts` compute nothing: all of them are always active, and no budget counts
    them.
    """
    if zero_experts:
        weighted = demand_B3E.shape[-1] - zero_experts
        demand_B3E = demand_B3E.clone()
        demand_B3E[..., weighted:] = 0
        active_BE, over_B = select_active_experts(demand_B3E, rule, placement)
        active_BE[..., weighted:] = True
        return active_BE, over_B
    guaranteed_BE = demand_B3E[..., GUARANTEED, :] > 0
    if not rule.has_budget:
        return guaranteed_BE, None
    best_BE = demand_B3E[..., BEST, :] > 0
    votes_BE = demand_B3E[..., VOTES, :]
    if rule.guaranteed is not None:
        votes_BE = votes_BE.masked_fill(~guaranteed_BE, 0)
    experts = demand_B3E.shape[-1]
    lower_E = lower_first(experts, demand_B3E.device)
    order_BE = torch.add(lower_E, votes_BE, alpha=experts).masked_fill(best_BE, _BEST)
    active_BE = best_BE | (votes_BE > 0)
    over_B = torch.zeros_like(best_BE[..., 0])
    if rule.budget_per_rank is not None:
        placed = placement or Placement.linear(experts, 1)
        order_BRE = by_rank(order_BE, placed, fill=-1)
        first_BE = from_ranks(_first(order_BRE, rule.budget_per_rank), placed)
        active_BE = active_BE & (first_BE | best_BE)
        bests_BR = by_rank(best_BE, placed, fill=False).sum(dim=-1)
        over_B = (bests_BR > rule.budget_per_rank).any(dim=-1)
    if rule.budget is not None:
        first_BE = _first(order_BE.masked_fill(~active_BE, -1), rule.budget)
        active_BE = active_BE & (first_BE | best_BE)
        over_B = over_B | (best_BE.sum(dim=-1) > rule.budget)
    return active_BE, over_B


def _first(order: Tensor, count: int) -> Tensor:
    """True on the `count` highest of the last dimension."""
    chosen = order.topk(min(count, order.shape[-1]), dim=-1)[1]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, chosen, True)


def by_rank(values_BE: Tensor, placement: Placement, fill: float | bool) -> Tensor:
    """(B,E) to (B,R,L); a rank's experts by id, `fill` where it has fewer than L."""
    experts_RE, _ = _tables(placement, values_BE.device)
    return functional.pad(values_BE, (0, 1), value=fill)[..., experts_RE]


def from_ranks(values_BRE: Tensor, placement: Placement) -> Tensor:
    """(B,R,L) as `by_rank` sorts it, back to (B,E)."""
    _, place_E = _tables(placement, values_BRE.device)
    return values_BRE.flatten(-2)[..., place_E]


@lru_cache(maxsize=64)
def _tables(placement: Placement, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which expert stands at each place (R,L), E at none, and each expert's place (E) in R x L."""
    held = [placement.experts_on(rank) for rank in range(placement.ranks)]
    most = max(map(len, held))
    with torch.inference_mode(False):
        experts_RE = torch.full((placement.ranks, most), placement.experts)
        place_E = torch.empty(placement.experts, dtype=torch.int64)
        for rank, ids in enumerate(held):
            experts_RE[rank, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            place_E[list(ids)] = rank * most + torch.arange(len(ids))
        return experts_RE.to(device), place_E.to(device)
