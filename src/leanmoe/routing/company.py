"""Which experts a whole step may wake: `guaranteed` and `budget`, where tokens share experts.

Letters: S independent steps (may be absent), T tokens, E experts, K slots a token. Slots come
best first; `kept` is False for slots that wake nobody (padding, dropped by threshold or top_p),
and None where every slot counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.routing.ranking import lower_first

_UNIT = 1 << 32
"""Votes are added as whole numbers of 1/_UNIT: the order of the tokens cannot change a sum."""
_BEST = 1 << 62
"""Above every expert's votes: _UNIT x tokens x experts."""


def guaranteed_experts(
    ids_STK: Tensor, kept_STK: Tensor | None, guaranteed: int, experts: int
) -> Tensor:
    """True [S,E] for experts among the first `guaranteed` kept slots of any token in the step.

    Phase 1 of OEA (arXiv 2511.02237, algorithm 1): what every token keeps of its own. Whatever
    else a token uses must be awake for someone (phase 2, `route`).
    """
    return _union(ids_STK, kept_STK, guaranteed, experts)


def budgeted_experts(
    ids_STK: Tensor, kept_STK: Tensor | None, votes_STK: Tensor, budget: int, experts: int
) -> tuple[Tensor, Tensor]:
    """The experts [S,E] a step may wake, at most `budget`, and [S] whether that is too few.

    Greedy by the total of the votes (0 to 1) that the step's tokens give an expert (XShare, arXiv
    2602.07265; Lynx, arXiv 2411.08982), after every token's first kept slot, which always stays:
    if those alone are more than `budget`, they are what is awake, and the second result says so.
    Equal totals: the lower id first. Nobody is woken without a vote, so fewer than `budget` may be
    awake.
    """
    best_SE = _union(ids_STK, kept_STK, 1, experts)
    whole_STK = (votes_STK.float() * _UNIT).long() + 1  # a slot counts, however small its gate
    if kept_STK is not None:
        whole_STK = whole_STK.masked_fill(~kept_STK, 0)
    votes_SN = whole_STK.flatten(-2)
    total_SE = votes_SN.new_zeros(best_SE.shape).scatter_add_(-1, ids_STK.flatten(-2), votes_SN)
    lower_E = lower_first(experts, ids_STK.device)
    order_SE = torch.add(lower_E, total_SE, alpha=experts).masked_fill(best_SE, _BEST)
    first_SB = order_SE.topk(min(budget, experts), dim=-1)[1]
    chosen_SE = torch.zeros_like(best_SE).scatter_(-1, first_SB, True)
    return best_SE | (chosen_SE & (total_SE > 0)), best_SE.sum(dim=-1) > budget


def _union(ids_STK: Tensor, kept_STK: Tensor | None, first: int, experts: int) -> Tensor:
    """True [S,E] for experts in a token's `first` slots; a column of its own takes dropped ones."""
    marked_STK = ids_STK[..., :first]
    if kept_STK is not None:
        marked_STK = marked_STK.masked_fill(~kept_STK[..., :first], experts)
    marked_SN = marked_STK.flatten(-2)
    shape = (*marked_SN.shape[:-1], experts + 1)
    union_SE = torch.zeros(shape, dtype=torch.bool, device=ids_STK.device)
    return union_SE.scatter_(-1, marked_SN, True)[..., :experts]
