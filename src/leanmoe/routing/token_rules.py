"""Which of a token's own best experts it keeps: `threshold` and `top_p`.

Both look at the gates of the token's picked slots, best ranked first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.plan import Rule


def wanted(gates_BTK: Tensor, rule: Rule, router: Router) -> Tensor:
    """True [B,T,K] for the slots that `threshold` and `top_p` both keep; at least one a token.

    `top_p` looks at the slots that `threshold` left, and counts their mass against all K slots.
    """
    gates_BTK = gates_BTK.float()
    if router.scoring == "softmax_after_top_k":
        gates_BTK = torch.softmax(gates_BTK, dim=-1)
    if rule.threshold is None:
        kept_BTK = torch.ones_like(gates_BTK, dtype=torch.bool)
    else:
        kept_BTK = above_threshold(gates_BTK, rule.threshold)
    return kept_BTK if rule.top_p is None else reaching_top_p(gates_BTK, rule.top_p, kept_BTK)


def above_threshold(gates_BTK: Tensor, threshold: float) -> Tensor:
    """True [B,T,K] where a gate is at least `threshold` times the token's best gate.

    NAEE's dynamic skipping (arXiv 2402.14800, section 3.3), for any number of experts. The best
    is always kept. With a ranking bias it may be a slot in the middle that goes.
    """
    return gates_BTK >= threshold * gates_BTK.amax(dim=-1, keepdim=True)


def reaching_top_p(gates_BTK: Tensor, top_p: float, kept_BTK: Tensor) -> Tensor:
    """True [B,T,K] on the shortest prefix of the kept slots that carries `top_p` of the mass.

    Dynamic routing by cumulative probability (arXiv 2403.07652, section 3.2), within the top-k:
    the mass is that of all K slots. Where the kept ones do not reach it, all of them stay; the
    first of them always stays.
    """
    mass_BTK = (gates_BTK * kept_BTK).cumsum(dim=-1)
    before_BTK = torch.nn.functional.pad(mass_BTK[..., :-1], (1, 0))
    enough_BT1 = top_p * gates_BTK.sum(dim=-1, keepdim=True)
    return kept_BTK & ((before_BTK < enough_BT1) | (before_BTK == 0))
