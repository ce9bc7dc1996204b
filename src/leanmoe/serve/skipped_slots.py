"""How a skipped slot is written for an engine: as its kernels read it.

Letters: T tokens, K slots a token, E experts.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Skipped(Enum):
    """What stands in a skipped slot; its weight is 0 in any case."""

    REPEATED = "the token's best expert again, weight 0"
    """For kernels that want an expert in every slot."""
    MINUS_ONE = "id -1"
    """For kernels that pass over it."""
    BEYOND = "passed over by leanmoe's experts"
    """Id E: what leanmoe's own kernels pass over."""

    def id(self, experts: int) -> int:
        """The id of a slot that is passed over."""
        return experts if self is Skipped.BEYOND else -1


def spelled(ids_TK: Tensor, experts: int, padding_T: Tensor | None, skipped: Skipped) -> Tensor:
    """`ids_TK` with each skipped slot, id E, written as an engine wants it."""
    if skipped is Skipped.REPEATED:
        return repeat_best(ids_TK, experts, padding_T)
    return ids_TK.masked_fill(ids_TK >= experts, skipped.id(experts))


def repeat_best(ids_TK: Tensor, experts: int, padding_T: Tensor | None = None) -> Tensor:
    """`ids_TK` with each skipped slot, id E, naming an expert that is awake anyway.

    That is the token's best, and for padding the first token's; 0 where there is none. As
    `kernels.route_gpu_ids` does it in its kernel.
    """
    best_T1 = ids_TK[:, :1]
    best_T1 = best_T1.masked_fill(best_T1 >= experts, 0)
    if padding_T is not None:
        best_T1 = torch.where(padding_T.unsqueeze(-1), best_T1[:1], best_T1)
    return torch.where(ids_TK < experts, ids_TK, best_T1)


def widened(ids_TK: Tensor, weights_TK: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ids and weights with `slots` slots, those that were missing skipped as in `repeat_best`."""
    missing = slots - ids_TK.shape[1]
    if missing <= 0:
        return ids_TK, weights_TK
    ids = torch.cat((ids_TK, ids_TK[:, :1].expand(-1, missing)), dim=1)
    return ids, torch.nn.functional.pad(weights_TK, (0, missing))
