"""Gate weights of the experts a token uses, normalised and scaled as its family does it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.routing.scores import NEVER, score_dtype


class WholeTopK(NamedTuple):
    """All of a token's own top-k, and how far the weights are normalised over what is left."""

    gates_BTK: Tensor
    renormalise: float
    """0 to below 1: see `Rule.renormalise`."""


def weigh(
    gates_BTK: Tensor,
    router: Router,
    kept_BTK: Tensor | None = None,
    whole: WholeTopK | None = None,
) -> Tensor:
    """Weights [B,T,K] from the gates of the picked slots; 0 where `kept_BTK` is False.

    With `norm_topk_prob` the kept gates are divided by their sum, then all are multiplied by
    `routed_scaling_factor`; with softmax_after_top_k the softmax runs over the kept slots. Where
    every slot is kept (None) these are the family's own operations in its own order. With `whole`
    the divisor is (sum of the kept)^a x (sum of the whole top-k)^(1 - a), a its `renormalise`;
    in a softmax they are sums of exponentials.
    """
    weights_BTK = _share(gates_BTK, router, kept_BTK, whole)
    return weights_BTK if router.scaling == 1.0 else weights_BTK * router.scaling


def votes(gates_BTK: Tensor, router: Router, kept_BTK: Tensor | None = None) -> Tensor:
    """How much [B,T,K], 0 to 1, a slot matters to its token: its weight before scaling."""
    return _share(gates_BTK, router, kept_BTK, None)


def _share(
    gates_BTK: Tensor, router: Router, kept_BTK: Tensor | None, whole: WholeTopK | None
) -> Tensor:
    if router.scoring == "softmax_after_top_k":
        return _softmax(gates_BTK, router, kept_BTK, whole)
    if kept_BTK is not None:
        gates_BTK = gates_BTK.masked_fill(~kept_BTK, 0.0)
    if not router.normalise:
        return gates_BTK
    if whole is None:
        return gates_BTK / _total(gates_BTK, router)
    total_BT1 = _total(whole.gates_BTK, router)
    if (a := whole.renormalise) != 0:
        total_BT1 = _total(gates_BTK, router).pow(a) * total_BT1.pow(1 - a)
    shares_BTK = gates_BTK / total_BT1
    if kept_BTK is None:
        return shares_BTK
    return shares_BTK.masked_fill(~kept_BTK, 0.0)  # padding's own top-k may be NaN


def _total(gates_BTK: Tensor, router: Router) -> Tensor:
    """What these gates are divided by (B,T,1)."""
    total_BT1 = gates_BTK.sum(dim=-1, keepdim=True)
    if router.normalise_epsilon:
        return total_BT1 + router.normalise_epsilon
    # No slot, or only ones whose gates underflow: nothing to divide by, weights of 0.
    return total_BT1.clamp(min=torch.finfo(total_BT1.dtype).tiny)


def _softmax(
    gates_BTK: Tensor, router: Router, kept_BTK: Tensor | None, whole: WholeTopK | None
) -> Tensor:
    dtype = score_dtype(router, gates_BTK)
    kept_gates_BTK = gates_BTK if kept_BTK is None else gates_BTK.masked_fill(~kept_BTK, NEVER)
    if whole is not None:
        log_BT1 = whole.gates_BTK.to(dtype).logsumexp(dim=-1, keepdim=True)
        if (a := whole.renormalise) != 0:
            log_BT1 = a * kept_gates_BTK.to(dtype).logsumexp(dim=-1, keepdim=True) + (
                (1 - a) * log_BT1
            )
        shares_BTK = (gates_BTK.to(dtype) - log_BT1).exp()
        return shares_BTK if kept_BTK is None else shares_BTK.masked_fill(~kept_BTK, 0.0)
    if kept_BTK is None:
        return torch.softmax(gates_BTK, dim=-1, dtype=dtype)
    weights_BTK = torch.softmax(kept_gates_BTK, dim=-1, dtype=dtype)
    return weights_BTK.masked_fill(~kept_BTK, 0.0)  # softmax gives NaN where no slot is kept
