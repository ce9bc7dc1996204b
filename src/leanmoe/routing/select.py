"""Which of a token's own best experts it keeps: `threshold` and `top_p`.

Both look at the gates of the token's picked slots, best first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def above_threshold(gates_STK: Tensor, threshold: float) -> Tensor:
    """True [S,T,K] where a gate is at least `threshold` times the token's best gate.

    NAEE's dynamic skipping (arXiv 2402.14800, section 3.3), for any number of experts. The best
    is always kept.
    """
    return gates_STK >= threshold * gates_STK.amax(dim=-1, keepdim=True)


def reaching_top_p(gates_STK: Tensor, top_p: float) -> Tensor:
    """True [S,T,K] on the smallest prefix of slots that carries `top_p` of the token's gate mass.

    Dynamic routing by cumulative probability (arXiv 2403.07652, section 3.2), within the top-k.
    The first slot is always kept.
    """
    mass_STK = gates_STK.cumsum(dim=-1)
    total_ST1 = mass_STK[..., -1:]
    before_STK = torch.nn.functional.pad(mass_STK[..., :-1], (1, 0))
    return before_STK < top_p * total_ST1
