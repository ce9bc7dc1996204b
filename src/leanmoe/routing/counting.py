"""How many experts a step wakes, and how many slots its tokens use.

Letters: S independent steps (may be absent), T tokens, E experts, K slots a token, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.plan.placement import Placement
from leanmoe.routing.placing import by_rank


def count_distinct(ids_STK: Tensor, experts: int) -> Tensor:
    """Distinct experts [S] (int64) awake in each step; skipped slots (id E) wake nobody."""
    return _awake(ids_STK, experts).sum(dim=-1)


def count_distinct_by_rank(ids_STK: Tensor, placement: Placement) -> Tensor:
    """Distinct experts (S,R) (int64) awake on each rank; the largest decides the step's time."""
    awake_SE = _awake(ids_STK, placement.experts)
    return by_rank(awake_SE, placement, fill=False).sum(dim=-1)


def count_slots(ids_STK: Tensor, experts: int) -> Tensor:
    """Slots [S] (int64) that the tokens of each step use: rows the experts compute."""
    return (ids_STK < experts).sum(dim=(-1, -2))


def _awake(ids_STK: Tensor, experts: int) -> Tensor:
    flat_SN = ids_STK.flatten(-2)
    shape = (*flat_SN.shape[:-1], experts + 1)
    awake_SE = torch.zeros(shape, dtype=torch.bool, device=ids_STK.device)
    return awake_SE.scatter_(-1, flat_SN, True)[..., :experts]
