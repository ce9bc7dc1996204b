"""Values of all experts, sorted by the rank that has them, and back.

Letters: S independent steps (may be absent), E experts, R ranks, L experts of the fullest rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.plan.placement import Placement


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
