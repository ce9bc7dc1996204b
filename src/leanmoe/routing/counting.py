"""How many experts a step wakes, and how many slots its tokens use.

Letters: S independent steps (may be absent), T tokens, E experts, K slots a token, R ranks.

Values of all experts, sorted by the rank that has them, and back.

Letters: S independent steps (may be absent), E experts, R ranks, L experts of the fullest rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.plan.placement import Placement


def count_distinct(ids_STK: Tensor, experts: int) -> Tensor:
    """Distinct experts [S] (int64) awake in each step; skipped slots (id E) wake nobody."""
    return _active(ids_STK, experts).sum(dim=-1)


def count_distinct_by_rank(ids_STK: Tensor, placement: Placement) -> Tensor:
    """Distinct experts (S,R) (int64) awake on each rank; the largest decides the step's time."""
    active_SE = _active(ids_STK, placement.experts)
    return by_rank(active_SE, placement, fill=False).sum(dim=-1)


def count_slots(ids_STK: Tensor, experts: int) -> Tensor:
    """Slots [S] (int64) that the tokens of each step use: rows the experts compute."""
    return (ids_STK < experts).sum(dim=(-1, -2))


def _active(ids_STK: Tensor, experts: int) -> Tensor:
    flat_SN = ids_STK.flatten(-2)
    shape = (*flat_SN.shape[:-1], experts + 1)
    active_SE = torch.zeros(shape, dtype=torch.bool, device=ids_STK.device)
    return active_SE.scatter_(-1, flat_SN, True)[..., :experts]


def by_rank(values_SE: Tensor, placement: Placement, fill: float | bool) -> Tensor:
    """(S,E) to (S,R,L); a rank's experts by id, `fill` where it has fewer than L."""
    experts_RL, _ = _tables(placement, values_SE.device)
    return functional.pad(values_SE, (0, 1), value=fill)[..., experts_RL]


def from_ranks(values_SRL: Tensor, placement: Placement) -> Tensor:
    """(S,R,L) as `by_rank` sorts it, back to (S,E)."""
    _, place_E = _tables(placement, values_SRL.device)
    return values_SRL.flatten(-2)[..., place_E]


@lru_cache(maxsize=64)
def _tables(placement: Placement, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which expert stands at each place (R,L), E at none, and each expert's place (E) in R x L."""
    held = [placement.experts_on(rank) for rank in range(placement.ranks)]
    most = max(map(len, held))
    with torch.inference_mode(False):
        experts_RL = torch.full((placement.ranks, most), placement.experts)
        place_E = torch.empty(placement.experts, dtype=torch.int64)
        for rank, ids in enumerate(held):
            experts_RL[rank, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            place_E[list(ids)] = rank * most + torch.arange(len(ids))
        return experts_RL.to(device), place_E.to(device)
