"""Gate weights of the experts a token uses, normalised and scaled as its family does it.

Letters: S independent steps (may be absent), T tokens, E experts, K slots a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.routing.scores import NEVER, score_dtype


def weigh(
    gates_STK: Tensor,
    router: Router,
    kept_STK: Tensor | None = None,
    full_STN: Tensor | None = None,
) -> Tensor:
    """Weights [S,T,K] from the gates of the picked slots; 0 where `kept_STK` is False.

    With `norm_topk_prob` the kept gates are divided by their sum, then all are multiplied by
    `routed_scaling_factor`; with softmax_after_top_k the softmax runs over the kept slots. Where
    every slot is kept (None) these are the family's own operations in its own order. `full_STN`,
    the gates of the token's whole top-k, takes the place of the kept ones in sum and softmax.
    """
    weights_STK = _share(gates_STK, router, kept_STK, full_STN)
    return weights_STK if router.scaling == 1.0 else weights_STK * router.scaling


def votes(gates_STK: Tensor, router: Router, kept_STK: Tensor | None = None) -> Tensor:
    """How much [S,T,K], 0 to 1, a slot matters to its token: its weight before scaling."""
    return _share(gates_STK, router, kept_STK, None)


def _share(
    gates_STK: Tensor, router: Router, kept_STK: Tensor | None, full_STN: Tensor | None
) -> Tensor:
    if router.scoring == "softmax_after_top_k":
        return _softmax(gates_STK, router, kept_STK, full_STN)
    if kept_STK is not None:
        gates_STK = gates_STK.masked_fill(~kept_STK, 0.0)
    if not router.normalise:
        return gates_STK
    total_ST1 = (gates_STK if full_STN is None else full_STN).sum(dim=-1, keepdim=True)
    if router.normalise_epsilon:
        total_ST1 = total_ST1 + router.normalise_epsilon
    else:  # no slot, or only ones whose gates underflow: nothing to divide by, weights of 0
        total_ST1 = total_ST1.clamp(min=torch.finfo(total_ST1.dtype).tiny)
    shares_STK = gates_STK / total_ST1
    if kept_STK is None or full_STN is None:
        return shares_STK
    return shares_STK.masked_fill(~kept_STK, 0.0)  # padding's own top-k may be NaN


def _softmax(
    gates_STK: Tensor, router: Router, kept_STK: Tensor | None, full_STN: Tensor | None
) -> Tensor:
    dtype = score_dtype(router, gates_STK)
    if full_STN is not None:
        total_ST1 = full_STN.to(dtype).logsumexp(dim=-1, keepdim=True)
        shares_STK = (gates_STK.to(dtype) - total_ST1).exp()
        return shares_STK if kept_STK is None else shares_STK.masked_fill(~kept_STK, 0.0)
    if kept_STK is None:
        return torch.softmax(gates_STK, dim=-1, dtype=dtype)
    kept_gates_STK = gates_STK.masked_fill(~kept_STK, NEVER)
    weights_STK = torch.softmax(kept_gates_STK, dim=-1, dtype=dtype)
    return weights_STK.masked_fill(~kept_STK, 0.0)  # softmax gives NaN where no slot is kept
