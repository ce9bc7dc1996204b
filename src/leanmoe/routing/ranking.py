"""A token's experts in one definite order: by ranking, equal ones by lower id.

torch.topk breaks ties as it likes, differently on each device. A token on its own may follow the
family's own call there; tokens that share experts must agree on who comes first.

Letters: S independent steps (may be absent), T tokens, E experts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NOT_USABLE = torch.iinfo(torch.int64).min
"""A key below every other: the expert is asleep."""
_LOWEST_BITS = -2139095040  # what `_ordered_bits` makes of the smallest finite float32
_FIRST = 1 << 50  # above every key: int32 bits x experts


def order_keys(ranking_STE: Tensor) -> Tensor:
    """Whole numbers [S,T,E], all different in a token, that order experts as the ranking does.

    The float32's bits as an integer that sorts like the float, followed by the id, lower better.
    """
    experts = ranking_STE.shape[-1]
    bits = (ranking_STE.float() + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.add(lower_first(experts, ranking_STE.device), bits, alpha=experts)


@lru_cache(maxsize=64)
def lower_first(experts: int, device: torch.device) -> Tensor:
    """E-1 to 0 [E]: added to a value times E, it decides between equal values."""
    with torch.inference_mode(False):
        return torch.arange(experts - 1, -1, -1, device=device)


def is_usable(keys: Tensor, experts: int) -> Tensor:
    """True where a key belongs to an expert the token may use (ranking above -inf, awake)."""
    return keys >= _LOWEST_BITS * experts


def put_first(keys_STE: Tensor, ids_STK: Tensor, chosen_STK: Tensor) -> Tensor:
    """Keys that rank a token's chosen slots above all its other experts, in their own order."""
    raised_STK = keys_STE.gather(-1, ids_STK) + chosen_STK * _FIRST
    return keys_STE.scatter(-1, ids_STK, raised_STK)
