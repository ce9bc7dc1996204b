"""How many experts a step wakes, and how many slots its tokens use."""

from __future__ import annotations

import torch
from torch import Tensor


def count_distinct(ids_STK: Tensor, experts: int) -> Tensor:
    """Distinct experts [S] awake in each step; skipped slots (id E) wake nobody."""
    flat_SN = ids_STK.flatten(-2)
    seen_SE = torch.zeros((*flat_SN.shape[:-1], experts + 1), device=ids_STK.device)
    return seen_SE.scatter_(-1, flat_SN, 1.0)[..., :experts].sum(dim=-1)


def count_slots(ids_STK: Tensor, experts: int) -> Tensor:
    """Slots [S] that the tokens of each step use: rows the experts compute."""
    return (ids_STK < experts).sum(dim=(-1, -2))
