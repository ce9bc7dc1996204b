"""How many experts a step wakes, and how many slots its tokens use.

Letters: B independent steps (may be absent), T tokens, E experts, K slots a token, R ranks.

Values of all experts, sorted by the rank that has them, and back.

Letters: B independent steps (may be absent), E experts, R ranks, L experts of the fullest rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.plan.placement import Placement


def count_distinct(ids_BTK: Tensor, experts: int) -> Tensor:
    """Distinct experts [B] (int64) awake in each step; skipped slots (id E) wake nobody."""
    return _active(ids_BTK, experts).sum(dim=-1)


def count_distinct_by_rank(ids_BTK: Tensor, placement: Placement) -> Tensor:
    """Distinct experts (B,R) (int64) awake on each rank; the largest decides the step's time."""
    active_BE = _active(ids_BTK, placement.experts)
    return by_rank(active_BE, placement, fill=False).sum(dim=-1)


def count_slots(ids_BTK: Tensor, experts: int) -> Tensor:
    """Slots [B] (int64) that the tokens of each step use: rows the experts compute."""
    return (ids_BTK < experts).sum(dim=(-1, -2))


def _active(ids_BTK: Tensor, experts: int) -> Tensor:
    flat_BX = ids_BTK.flatten(-2)
    shape = (*flat_BX.shape[:-1], experts + 1)
    active_BE = torch.zeros(shape, dtype=torch.bool, device=ids_BTK.device)
    return active_BE.scatter_(-1, flat_BX, True)[..., :experts]


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
