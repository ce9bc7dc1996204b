"""Which experts a whole step may wake: `guaranteed` and the budgets, where tokens share experts.

First the step's tokens cast a ballot, then the ballot alone decides. Ballots add up: the sum of
several ranks' is that of all their tokens, and gives each of them the same decision.

Letters: S independent steps (may be absent), T tokens, E experts, K slots a token, R ranks, L
experts of a rank. Slots come best first; `kept` is False for slots that wake nobody (padding,
dropped by threshold or top_p), and None where every slot counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing.counting import (
    by_rank,
    from_ranks,
)
from leanmoe.routing.scores import (
    lower_first,
)

BEST, GUARANTEED, VOTES = range(3)
"""Rows of a ballot (S,3,E), int64: tokens whose best an expert is, tokens that guarantee it, and
the sum of its votes."""
_UNIT = 1 << 32
"""Votes are added as whole numbers of 1/_UNIT: the order of the tokens cannot change a sum."""
_BEST = 1 << 62
"""Above every expert's votes: _UNIT x tokens x experts."""


@dataclass(frozen=True)
class BatchScope:
    """With whom the tokens of a step share experts, and where the experts are."""

    placement: Placement | None = None
    """None: one rank has all experts."""
    exchange: Callable[[Tensor], Tensor] | None = None
    """Makes of a step's ballot (S,3,E) that of the tokens of all ranks; it is called for each step,
    also one without tokens. None: the step's own tokens are all there are."""

    @property
    def ranks(self) -> int:
        """Ranks that the experts are spread over."""
        return 1 if self.placement is None else self.placement.ranks


ALONE = BatchScope()
"""One process, all tokens and all experts in it."""


def count_demand(
    ids_STK: Tensor,
    kept_STK: Tensor | None,
    experts: int,
    guaranteed: int | None = None,
    votes_STK: Tensor | None = None,
) -> Tensor:
    """What a step's tokens say of the experts (S,3,E), as `BEST`, `GUARANTEED` and `VOTES` have it.

    `votes_STK`, 0 to 1, are how much a slot matters to its token. Rows that are not asked for stay
    0: the shape is the same for any rule, and for no tokens.
    """
    demand_S3E = ids_STK.new_zeros((*ids_STK.shape[:-2], 3, experts))
    count_STK = torch.ones_like(ids_STK) if kept_STK is None else kept_STK.long()

    def add(row: int, slots: int, values_STK: Tensor) -> None:
        ids_SN, values_SN = (x[..., :slots].flatten(-2) for x in (ids_STK, values_STK))
        demand_S3E[..., row, :].scatter_add_(-1, ids_SN, values_SN)

    add(BEST, 1, count_STK)
    if guaranteed is not None:
        add(GUARANTEED, guaranteed, count_STK)
    if votes_STK is not None:
        whole_STK = (votes_STK.float() * _UNIT).long() + 1  # a slot counts, however small its gate
        add(VOTES, ids_STK.shape[-1], whole_STK.masked_fill(count_STK == 0, 0))
    return demand_S3E


def select_active_experts(
    demand_S3E: Tensor, rule: Rule, placement: Placement | None = None
) -> tuple[Tensor, Tensor | None]:
    """The experts (S,E) a step may wake, and (S) whether a budget is too small for it.

    `guaranteed`: those that some token guarantees. Phase 1 of OEA (arXiv 2511.02237, algorithm 1):
    whatever else a token uses must be awake for someone (phase 2, `route`).

    `budget` and `budget_per_rank`: greedy by the total of the votes that an expert gets (XShare,
    arXiv 2602.07265; Lynx, arXiv 2411.08982), after every token's best, which always stays; an
    expert whose rank is full is passed over. Where the bests alone are more than a budget, in all
    or on a rank, they are what is awake there, and the second result says so. Equal totals: the
    lower id first. Nobody is woken without a vote, so fewer may be awake.

    With both kinds the candidates are the guaranteed ones, and the budget prevails.
    """
    guaranteed_SE = demand_S3E[..., GUARANTEED, :] > 0
    if not rule.has_budget:
        return guaranteed_SE, None
    best_SE = demand_S3E[..., BEST, :] > 0
    votes_SE = demand_S3E[..., VOTES, :]
    if rule.guaranteed is not None:
        votes_SE = votes_SE.masked_fill(~guaranteed_SE, 0)
    experts = demand_S3E.shape[-1]
    lower_E = lower_first(experts, demand_S3E.device)
    order_SE = torch.add(lower_E, votes_SE, alpha=experts).masked_fill(best_SE, _BEST)
    active_SE = best_SE | (votes_SE > 0)
    over_S = torch.zeros_like(best_SE[..., 0])
    if rule.budget_per_rank is not None:
        placed = placement or Placement.linear(experts, 1)
        order_SRL = by_rank(order_SE, placed, fill=-1)
        first_SE = from_ranks(_first(order_SRL, rule.budget_per_rank), placed)
        active_SE = active_SE & (first_SE | best_SE)
        bests_SR = by_rank(best_SE, placed, fill=False).sum(dim=-1)
        over_S = (bests_SR > rule.budget_per_rank).any(dim=-1)
    if rule.budget is not None:
        first_SE = _first(order_SE.masked_fill(~active_SE, -1), rule.budget)
        active_SE = active_SE & (first_SE | best_SE)
        over_S = over_S | (best_SE.sum(dim=-1) > rule.budget)
    return active_SE, over_S


def _first(order: Tensor, count: int) -> Tensor:
    """True on the `count` highest of the last dimension."""
    chosen = order.topk(min(count, order.shape[-1]), dim=-1)[1]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, chosen, True)
