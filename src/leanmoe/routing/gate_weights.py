"""Gate weights of the experts a token uses, normalised and scaled as its family does it."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.routing.scores import NEVER, score_dtype


def weigh(
    gates_BTK: Tensor,
    router: Router,
    kept_BTK: Tensor | None = None,
    full_BTK: Tensor | None = None,
) -> Tensor:
    """Weights [B,T,K] from the gates of the picked slots; 0 where `kept_BTK` is False.

    With `norm_topk_prob` the kept gates are divided by their sum, then all are multiplied by
    `routed_scaling_factor`; with softmax_after_top_k the softmax runs over the kept slots. Where
    every slot is kept (None) these are the family's own operations in its own order. `full_BTK`,
    the gates of the token's whole top-k, takes the place of the kept ones in sum and softmax.
    """
    weights_BTK = _share(gates_BTK, router, kept_BTK, full_BTK)
    return weights_BTK if router.scaling == 1.0 else weights_BTK * router.scaling


def votes(gates_BTK: Tensor, router: Router, kept_BTK: Tensor | None = None) -> Tensor:
    """How much [B,T,K], 0 to 1, a slot matters to its token: its weight before scaling."""
    return _share(gates_BTK, router, kept_BTK, None)


def _share(
    gates_BTK: Tensor, router: Router, kept_BTK: Tensor | None, full_BTK: Tensor | None
) -> Tensor:
    if router.scoring == "softmax_after_top_k":
        return _softmax(gates_BTK, router, kept_BTK, full_BTK)
    if kept_BTK is not None:
        gates_BTK = gates_BTK.masked_fill(~kept_BTK, 0.0)
    if not router.normalise:
        return gates_BTK
    total_BT1 = (gates_BTK if full_BTK is None else full_BTK).sum(dim=-1, keepdim=True)
    if router.normalise_epsilon:
        total_BT1 = total_BT1 + router.normalise_epsilon
    else:  # no slot, or only ones whose gates underflow: nothing to divide by, weights of 0
        total_BT1 = total_BT1.clamp(min=torch.finfo(total_BT1.dtype).tiny)
    shares_BTK = gates_BTK / total_BT1
    if kept_BTK is None or full_BTK is None:
        return shares_BTK
    return shares_BTK.masked_fill(~kept_BTK, 0.0)  # padding's own top-k may be NaN


def _softmax(
    gates_BTK: Tensor, router: Router, kept_BTK: Tensor | None, full_BTK: Tensor | None
) -> Tensor:
    dtype = score_dtype(router, gates_BTK)
    if full_BTK is not None:
        total_BT1 = full_BTK.to(dtype).logsumexp(dim=-1, keepdim=True)
        shares_BTK = (gates_BTK.to(dtype) - total_BT1).exp()
        return shares_BTK if kept_BTK is None else shares_BTK.masked_fill(~kept_BTK, 0.0)
    if kept_BTK is None:
        return torch.softmax(gates_BTK, dim=-1, dtype=dtype)
    kept_gates_BTK = gates_BTK.masked_fill(~kept_BTK, NEVER)
    weights_BTK = torch.softmax(kept_gates_BTK, dim=-1, dtype=dtype)
    return weights_BTK.masked_fill(~kept_BTK, 0.0)  # softmax gives NaN where no slot is kept
