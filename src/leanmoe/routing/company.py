"""Which experts a whole step may wake: `guaranteed` and `budget`, where tokens share experts."""

from __future__ import annotations

import torch
from torch import Tensor


def guaranteed_experts(ids_STK: Tensor, votes_STK: Tensor, guaranteed: int, experts: int) -> Tensor:
    """True [S,E] for experts among the best `guaranteed` of any token in the step.

    OEA (arXiv 2511.02237, algorithm 1): what every token keeps of its own; whatever else a token
    uses must already be awake for someone. `votes_STK` is False for slots that wake nobody
    (padding, slots that threshold or top_p dropped); slots are ordered best first.
    """
    return _union(ids_STK[..., :guaranteed], votes_STK[..., :guaranteed], experts)


def budgeted_experts(
    ids_STK: Tensor, gates_STK: Tensor, votes_STK: Tensor, budget: int, experts: int
) -> tuple[Tensor, Tensor]:
    """The experts [S,E] a step may wake, at most `budget`, and [S] whether that is too few.

    Greedy by the total gate that the step's tokens give an expert (XShare, arXiv 2602.07265;
    Lynx, arXiv 2411.08982), after every token's best, which always stays: if those alone are more
    than `budget`, they are what is awake, and the second result says so. A token's gates count as
    shares of its own total, so that no token outvotes another. Equal totals: the lower id first.
    """
    share_STK = (gates_STK * votes_STK).float()
    share_STK = share_STK / share_STK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    total_SE = _sum_by_expert(share_STK, ids_STK, experts)
    best_SE = _union(ids_STK[..., :1], votes_STK[..., :1], experts)
    order_SE = (total_SE + best_SE * (1 + total_SE.amax())).argsort(
        dim=-1, descending=True, stable=True
    )
    place = torch.arange(experts, device=ids_STK.device).expand_as(order_SE)
    rank_SE = torch.empty_like(order_SE).scatter_(-1, order_SE, place)
    awake_SE = best_SE | ((rank_SE < budget) & (total_SE > 0))
    return awake_SE, best_SE.sum(dim=-1) > budget


def _union(ids_STK: Tensor, votes_STK: Tensor, experts: int) -> Tensor:
    return _sum_by_expert(votes_STK.float(), ids_STK, experts) > 0


def _sum_by_expert(values_STK: Tensor, ids_STK: Tensor, experts: int) -> Tensor:
    shape = (*ids_STK.shape[:-2], experts)
    flat_SN = values_STK.flatten(-2)
    return flat_SN.new_zeros(shape).scatter_add_(-1, ids_STK.flatten(-2), flat_SN)
