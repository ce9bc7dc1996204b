"""The experts of every token of a call, each part of it under its own rules.

`LayerRouting` chooses them, by the reference or by a kernel where one can. `FastRouter` stands in
for a router module: a linear layer and a choice among its outputs, which in plain torch operations
takes longer than the chosen experts of a small model. It does so only where, on a probe, the
module's logits are its weight times the hidden states and our choice is the module's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.kernels.dispatch import Route, fast_route, route_by_reference
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import ALONE, BatchScope, Routing
from leanmoe.runtime.counts import RoutingCounts
from leanmoe.runtime.model import MoELayer, forward_parameters
from leanmoe.runtime.step import StepPart

PROBE_TOKENS = 5

logger = logging.getLogger(__name__)
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (T,E) to ids and weights (T,K)."""
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
Observe = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's number and a step's ids and weights (T,K), which it must not change."""


@dataclass(frozen=True)
class LayerRouting:
    """How one layer's tokens are routed, whatever the call."""

    number: int
    router: Router
    top_k: int
    """The model's own."""
    experts: int
    bias_E: Tensor | None
    scale_E: Tensor | None
    """The family's factor on each expert's weight."""
    is_fast: bool
    """Whether our own routing may stand for the reference."""
    counts: tuple[RoutingCounts, RoutingCounts] | None
    """Where to count what generated tokens do and what prompt tokens do."""
    scope: BatchScope = ALONE
    observe: Observe | None = None

    def choose(
        self, logits_TE: Tensor, stock: tuple[Tensor, Tensor] | None, parts: Sequence[StepPart]
    ) -> tuple[Tensor, Tensor, bool]:
        """Ids and weights (T,K) under the parts' rules, and whether any slot may be skipped.

        `stock` is what the model's own router chose: it stands wherever a rule is empty.
        """
        if len(parts) == 1 and parts[0].index_BT is None:
            ids_TK, weights_TK = self._part(logits_TE, stock, parts[0], None)
            skips = _skips(parts[0], self.number)
        else:
            ids_TK, weights_TK = self._joined(logits_TE, stock, parts)
            skips = True
        if self.observe is not None:
            self.observe(self.number, ids_TK, weights_TK)
        return ids_TK, weights_TK, skips

    def _part(
        self,
        logits_TE: Tensor,
        stock: tuple[Tensor, Tensor] | None,
        part: StepPart,
        index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rule = part.rules[self.number]
        if rule.is_empty and stock is not None:
            ids, weights = stock if index is None else (stock[0][index], stock[1][index])
        else:
            logits = logits_TE if index is None else logits_TE[index]
            ids, weights, over_B = self._route(logits, rule, part.padding_BT)
            weights = weights if stock is None else weights.to(stock[1].dtype)
            self._count_budget(over_B, part)
        self._count(ids, part)
        return ids, weights

    def _route(self, logits: Tensor, rule: Rule, padding: Tensor | None) -> Routing:
        function: Route = fast_route if self.is_fast else route_by_reference
        routing = function(logits, self.router, self.top_k, rule, self.bias_E, padding, self.scope)
        if self.scale_E is None:
            return routing
        scales_BTK = self.scale_E[routing.ids_BTK.clamp(max=self.experts - 1)]
        return routing._replace(weights_BTK=routing.weights_BTK * scales_BTK)

    def _joined(
        self, logits_TE: Tensor, stock: tuple[Tensor, Tensor] | None, parts: Sequence[StepPart]
    ) -> tuple[Tensor, Tensor]:
        """The parts' slots in token order, with as many slots as the widest part has."""
        most, *others = sorted(parts, key=_tokens, reverse=True)
        # Routing the others' tokens too is cheaper than taking the largest part's out and back.
        index = None if self._fits_all(most, logits_TE.shape[0]) else most.index_BT
        chosen = [(index, *self._part(logits_TE, stock, most, index))]
        chosen += [(p.index_BT, *self._part(logits_TE, stock, p, p.index_BT)) for p in others]
        slots = max(ids.shape[-1] for _, ids, _ in chosen)
        all_ids_TK = chosen[0][1].new_full((logits_TE.shape[0], slots), self.experts)
        all_weights_TK = chosen[0][2].new_zeros((logits_TE.shape[0], slots))
        for place, ids, weights in chosen:
            if place is None:
                all_ids_TK[:, : ids.shape[-1]] = ids
                all_weights_TK[:, : ids.shape[-1]] = weights
            else:
                at = place.flatten()
                all_ids_TK[at] = _widened(ids, slots, self.experts)
                all_weights_TK[at] = _widened(weights, slots, 0)
        return all_ids_TK, all_weights_TK

    def _fits_all(self, part: StepPart, tokens: int) -> bool:
        """Whether the part is most of the call and its tokens are routed each on its own."""
        alone = not part.rules[self.number].is_batch_aware and part.padding_BT is None
        return alone and self.counts is None and 2 * _tokens(part) > tokens

    def _count(self, ids: Tensor, part: StepPart) -> None:
        if self.counts is None:
            return
        ids_BTK = ids if ids.dim() == 3 else ids.unsqueeze(0)
        padding_BT = part.padding_BT
        if padding_BT is not None and padding_BT.dim() == 1:
            padding_BT = padding_BT.unsqueeze(0)
        weighted = self.experts - self.router.zero_experts  # an identity is as good as skipped
        self.counts[part.is_prompt].add(ids_BTK.clamp(max=weighted), padding_BT, weighted)

    def _count_budget(self, over_B: Tensor | None, part: StepPart) -> None:
        if over_B is not None and self.counts is not None:
            self.counts[part.is_prompt].over_budget_steps += int(over_B.sum())


def _tokens(part: StepPart) -> int:
    assert part.index_BT is not None
    return part.index_BT.numel()


def _widened(values: Tensor, slots: int, fill: int) -> Tensor:
    """(...,K) to (T,slots), the slots beyond K filled."""
    flat_TK = values.flatten(0, -2)
    return functional.pad(flat_TK, (0, slots - flat_TK.shape[-1]), value=fill)


def _skips(part: StepPart, layer: int) -> bool:
    """Whether a slot may be skipped: never under an empty rule or one with a plain `top_k`."""
    rule = part.rules[layer]
    if rule.is_empty:
        return False
    return rule != Rule(top_k=rule.top_k) or rule.top_k == 0 or part.padding_BT is not None


def without_skipped(
    stock: Experts, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int,
    has_identity: bool = False,
) -> Tensor:  # fmt: skip
    """Runs an implementation that knows no skipped slots on the slots that are left.

    Each is a token of its own with one slot, so that skipped ones cost no row and leak no NaN.
    Where the last expert is the identity, with that one too, at weight 0: LongCat's class cannot
    compute tokens of one slot.
    """
    token_X, slot_X = (ids_TK < experts).nonzero(as_tuple=True)
    out_TD = torch.zeros_like(hidden_TD)
    if len(token_X):
        ids_X1 = ids_TK[token_X, slot_X].unsqueeze(-1)
        weights_X1 = weights_TK[token_X, slot_X].unsqueeze(-1)
        if has_identity:
            ids_X1 = functional.pad(ids_X1, (0, 1), value=experts - 1)
            weights_X1 = functional.pad(weights_X1, (0, 1))
        rows_XD = stock(hidden_TD[token_X], ids_X1, weights_X1)
        out_TD.index_add_(0, token_X, rows_XD.to(out_TD.dtype))
    return out_TD


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
    module, experts = layer.router, layer.expert_count
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
        stand_in = FastRouter(module, dtype, weights_TK.dtype, places)
        ours_TE = stand_in.logits(probe_TD)
        same = ours_TE.dtype is logits_TE.dtype and torch.equal(ours_TE, logits_TE)
        if same and _chooses_alike(ours_TE, ids_TK, weights_TK, layer, router, top_k):
            return stand_in
    logger.info("%s: its router is not one we know to replace; it runs as it is", layer.name)
    return None


def _takes_hidden_alone(module: Any) -> bool:
    """Whether its forward is its class's own and takes nothing but hidden states.

    What has a default may be given all the same: LFM2's block gives its router the bias.
    """
    return "forward" not in vars(module) and len(forward_parameters(module)) == 1


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
    ours_TE = nothing_TE.scatter(-1, ours.ids_BTK, ours.weights_BTK.float())
    return torch.allclose(ours_TE, theirs_TE, rtol=2e-2 if weights_TK.dtype.itemsize < 4 else 1e-4)
