"""Our own routing in place of a router module's, where it is sure to be the same.

A router is a linear layer and a choice among its outputs. The choice, in plain torch operations,
takes longer than the chosen experts of a small model do. Where a module's logits turn out to be
its weight times the hidden states, and our choice the module's own, on a probe, ours stands in.

Letters: T tokens, E experts, K slots a token, D hidden width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.runtime.layers import MoELayer
from leanmoe.runtime.routing import fast_route

PROBE_TOKENS = 5

logger = logging.getLogger(__name__)
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (T,E) to ids and weights (T,K)."""


@dataclass(frozen=True)
class FastRouter:
    """How one router module makes its logits, and what its forward returns."""

    module: Any
    dtype: torch.dtype
    """In which the linear layer runs."""
    weights_dtype: torch.dtype
    places: tuple[int, int, int]
    """Of logits, weights and ids in the module's output."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Router logits (T,E) of hidden states (...,D)."""
        flat_TD = hidden.reshape(-1, hidden.shape[-1]).to(self.dtype)
        bias = getattr(self.module, "bias", None)
        bias = None if bias is None else bias.to(self.dtype)
        return functional.linear(flat_TD, self.module.weight.to(self.dtype), bias)

    def forward(self, hidden: Tensor, choose: Choose) -> tuple[Tensor, ...]:
        """What the module's forward returns, with the experts that `choose` picks."""
        logits_TE = self.logits(hidden)
        ids_TK, weights_TK = choose(logits_TE)
        returned = {
            self.places[0]: logits_TE,
            self.places[1]: weights_TK.to(self.weights_dtype),
            self.places[2]: ids_TK,
        }
        return tuple(returned[place] for place in range(3))


@torch.inference_mode()
def fast_router(layer: MoELayer, router: Router, top_k: int) -> FastRouter | None:
    """The stand-in for a layer's router; None where it would not be the same."""
    module, experts = layer.router, int(layer.experts.num_experts)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dim() != 2:
        return None
    if weight.shape[0] != experts or experts == top_k or not _takes_hidden_alone(module):
        return None
    draw = torch.Generator().manual_seed(0)
    probe_TD = torch.randn(PROBE_TOKENS, weight.shape[1], generator=draw).to(weight)
    output = module(probe_TD)
    places = _places(output, experts, top_k)
    if places is None or [o.shape for o in module(probe_TD[None])] != [o.shape for o in output]:
        return None
    logits_TE, weights_TK, ids_TK = (output[place] for place in places)
    for dtype in (torch.float32, weight.dtype):
        found = FastRouter(module, dtype, weights_TK.dtype, places)
        ours_TE = found.logits(probe_TD)
        same = ours_TE.dtype is logits_TE.dtype and torch.equal(ours_TE, logits_TE)
        if same and _chooses_alike(ours_TE, ids_TK, weights_TK, layer, router, top_k):
            return found
    logger.info("%s: its router is not one we know to replace; it runs as it is", layer.name)
    return None


def _takes_hidden_alone(module: Any) -> bool:
    """Whether its forward is its class's own and wants nothing but hidden states."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return "forward" not in vars(module) and len(required) == 1


def _places(output: Any, experts: int, top_k: int) -> tuple[int, int, int] | None:
    if not isinstance(output, tuple) or len(output) != 3:
        return None
    kinds = [
        (part.is_floating_point(), part.shape[-1] if part.dim() == 2 else 0) for part in output
    ]
    wanted = [(True, experts), (True, top_k), (False, top_k)]
    if sorted(kinds) != sorted(wanted):
        return None
    return (kinds.index(wanted[0]), kinds.index(wanted[1]), kinds.index(wanted[2]))


def _chooses_alike(
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    layer: MoELayer,
    router: Router,
    top_k: int,
) -> bool:
    bias_E = layer.ranking_bias(router)
    ours = fast_route(logits_TE, router, top_k, Rule(), bias_E)
    nothing_TE = torch.zeros_like(logits_TE, dtype=torch.float32)
    theirs_TE = nothing_TE.scatter(-1, ids_TK, weights_TK.float())
    ours_TE = nothing_TE.scatter(-1, ours.ids_STK, ours.weights_STK.float())
    return torch.allclose(ours_TE, theirs_TE, rtol=2e-2 if weights_TK.dtype.itemsize < 4 else 1e-4)
