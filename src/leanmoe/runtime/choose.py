"""The experts of every token of a call, each part of it under its own rules.

Letters: T tokens of the call, E experts, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import ALONE, Company, Routing, route
from leanmoe.runtime.counts import LayerCounts
from leanmoe.runtime.routing import fast_route
from leanmoe.runtime.step import Part

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
    is_fast: bool
    """Whether our own routing may stand for the reference."""
    counts: tuple[LayerCounts, LayerCounts] | None
    """Where to count what generated tokens do and what prompt tokens do."""
    company: Company = ALONE
    observe: Observe | None = None

    def choose(
        self, logits_TE: Tensor, stock: tuple[Tensor, Tensor] | None, parts: Sequence[Part]
    ) -> tuple[Tensor, Tensor, bool]:
        """Ids and weights (T,K) under the parts' rules, and whether any slot may be skipped.

        `stock` is what the model's own router chose: it stands wherever a rule is empty.
        """
        if len(parts) == 1 and parts[0].index_ST is None:
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
        part: Part,
        index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rule = part.rules[self.number]
        if rule.is_empty and stock is not None:
            ids, weights = stock if index is None else (stock[0][index], stock[1][index])
        else:
            logits = logits_TE if index is None else logits_TE[index]
            ids, weights, over_S = self._route(logits, rule, part.padding_ST)
            weights = weights if stock is None else weights.to(stock[1].dtype)
            self._count_budget(over_S, part)
        self._count(ids, part)
        return ids, weights

    def _route(self, logits: Tensor, rule: Rule, padding: Tensor | None) -> Routing:
        function = fast_route if self.is_fast else route
        return function(logits, self.router, self.top_k, rule, self.bias_E, padding, self.company)

    def _joined(
        self, logits_TE: Tensor, stock: tuple[Tensor, Tensor] | None, parts: Sequence[Part]
    ) -> tuple[Tensor, Tensor]:
        """The parts' slots in token order, with as many slots as the widest part has."""
        most, *others = sorted(parts, key=_tokens, reverse=True)
        # Routing the others' tokens too is cheaper than taking the largest part's out and back.
        index = None if self._fits_all(most, logits_TE.shape[0]) else most.index_ST
        chosen = [(index, *self._part(logits_TE, stock, most, index))]
        chosen += [(p.index_ST, *self._part(logits_TE, stock, p, p.index_ST)) for p in others]
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

    def _fits_all(self, part: Part, tokens: int) -> bool:
        """Whether the part is most of the call and its tokens are routed each on its own."""
        alone = not part.rules[self.number].depends_on_company and part.padding_ST is None
        return alone and self.counts is None and 2 * _tokens(part) > tokens

    def _count(self, ids: Tensor, part: Part) -> None:
        if self.counts is None:
            return
        ids_STK = ids if ids.dim() == 3 else ids.unsqueeze(0)
        padding_ST = part.padding_ST
        if padding_ST is not None and padding_ST.dim() == 1:
            padding_ST = padding_ST.unsqueeze(0)
        self.counts[part.is_prompt].add(ids_STK, padding_ST, self.experts)

    def _count_budget(self, over_S: Tensor | None, part: Part) -> None:
        if over_S is not None and self.counts is not None:
            self.counts[part.is_prompt].over_budget_steps += int(over_S.sum())


def _tokens(part: Part) -> int:
    assert part.index_ST is not None
    return part.index_ST.numel()


def _widened(values: Tensor, slots: int, fill: int) -> Tensor:
    """(...,K) to (T,slots), the slots beyond K filled."""
    flat_TK = values.flatten(0, -2)
    return functional.pad(flat_TK, (0, slots - flat_TK.shape[-1]), value=fill)


def _skips(part: Part, layer: int) -> bool:
    """Whether a slot may be skipped: never under an empty rule or one with a plain `top_k`."""
    rule = part.rules[layer]
    if rule.is_empty:
        return False
    return rule != Rule(top_k=rule.top_k) or rule.top_k == 0 or part.padding_ST is not None


def without_skipped(
    stock: Experts, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int
) -> Tensor:
    """Runs an implementation that knows no skipped slots on the slots that are left.

    Each is a token of its own with one slot, so that skipped ones cost no row and leak no NaN.
    """
    token_R, slot_R = (ids_TK < experts).nonzero(as_tuple=True)
    out_TD = torch.zeros_like(hidden_TD)
    if len(token_R):
        rows_RD = stock(
            hidden_TD[token_R],
            ids_TK[token_R, slot_R].unsqueeze(-1),
            weights_TK[token_R, slot_R].unsqueeze(-1),
        )
        out_TD.index_add_(0, token_R, rows_RD.to(out_TD.dtype))
    return out_TD
