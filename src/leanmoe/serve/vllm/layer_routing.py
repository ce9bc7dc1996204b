"""One MoE layer's experts under a plan: what stands in place of vLLM's `_compute_routing`.

Letters: T rows of a step, E experts, K slots a token.

On a GPU vLLM calls this from inside an operator of its own, so it runs as plain Python whenever a
step is run or captured. On a CPU torch.compile traces it: there all of it is one operator, which
looks the step up when it runs.
"""

from __future__ import annotations

import copy
import itertools
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.plan import Plan, Rule
from leanmoe.routing import ALONE, BatchScope
from leanmoe.serve.routing_choice import choose, is_plain
from leanmoe.serve.routing_statistics import Statistics
from leanmoe.serve.skipped_slots import Skipped, widened
from leanmoe.serve.vllm import grouped_steps
from leanmoe.serve.vllm.padding import padding_rows
from leanmoe.serve.vllm.skipping import Skipping
from leanmoe.serve.vllm.vllm_router import ranking_bias, read_router

_layers: WeakValueDictionary[int, LayerRouting] = WeakValueDictionary()
_numbers = itertools.count()


class LayerRouting:
    """Routes one layer; an instance takes the place of its router's `_compute_routing`."""

    def __init__(
        self,
        router: Any,
        plan: Plan,
        layer: int,
        *,
        sequence_parallel: tuple[int, int] | None = None,
        is_full_width: bool = False,
        statistics: Statistics | None = None,
        scope: BatchScope = ALONE,
    ) -> None:
        """`layer` counts MoE layers; `is_full_width` gives every step the model's own K slots.

        `scope` says where the layer's experts are, and how to hear of other ranks' tokens.
        """
        self.plan, self.layer = plan, layer
        self._vllm, self._experts = router, plan.model.experts
        self._stock = router._compute_routing
        self._sequence_parallel = sequence_parallel
        self._is_full_width = is_full_width
        self._statistics = statistics
        self.scope = scope
        self.skipping = Skipping()
        """Set when the layer is loaded, and it is known what its experts do."""
        self._most_slots = max(self._slots(rule) for rule in self.rules)
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def rules(self) -> list[Rule]:
        """The layer's rule in each band, and the one beyond the last where that has an end."""
        found = [band.rules[self.layer] for band in self.plan.bands]
        ends = not self.plan.bands or self.plan.bands[-1].up_to is not None
        return [*found, Rule()] if ends else found

    @property
    def slots(self) -> set[int]:
        """The slots a token has under the layer's rules."""
        return {self._slots(rule) for rule in self.rules}

    @property
    def may_skip(self) -> bool:
        """Whether a slot may have an id that is no expert's: not where ids leave the layer."""
        return not self._is_full_width

    @cached_property
    def router(self) -> Router:
        """How vLLM's own router chooses."""
        return read_router(self._vllm)

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights (T,K), float32, and logical ids (T,K), as vLLM wants them."""
        if torch.compiler.is_compiling():
            bias, ids_dtype = ranking_bias(self._vllm), indices_type or torch.int32
            found: tuple[Tensor, Tensor] = _route_op(
                router_logits, bias, self._number, self._most_slots, ids_dtype
            )
            return found
        rule = self._rule(router_logits.shape[0])
        padding_T: Tensor | None = None
        if is_plain(rule):
            router = self._vllm
            compute = self._stock
            if rule.top_k not in (None, router.top_k):
                router = copy.copy(router)
                router.top_k = rule.top_k
                compute = type(router)._compute_routing.__get__(router)
            weights, ids = compute(hidden_states, router_logits, indices_type, input_ids=input_ids)
        else:
            ids_dtype = indices_type or torch.int32
            padding_T = padding_rows(router_logits.shape[0], self._sequence_parallel)
            step = (router_logits.shape[0], self._slots(rule), self._experts)
            is_grouped = self.skipping.is_grouped(rule, *step)
            skipped = self.skipping.usual if is_grouped else self.skipping.of(*step)
            ids, weights = self._choose(
                router_logits, ranking_bias(self._vllm), rule, padding_T, ids_dtype, skipped
            )
            if is_grouped:
                grouped_steps.ask(ids)
        if self._is_full_width:
            ids, weights = widened(ids, weights, self.plan.model.top_k)
        if self._statistics is not None:
            self._statistics.note(self.layer, ids, weights, padding_T)
        return weights, ids

    def _choose(
        self,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        rule: Rule,
        padding_T: Tensor | None,
        ids_dtype: torch.dtype,
        skipped: Skipped = Skipped.REPEATED,
    ) -> tuple[Tensor, Tensor]:
        top_k = self.plan.model.top_k
        step = (logits_TE, self.router, top_k, rule, bias_E, padding_T, ids_dtype)
        return choose(*step, skipped, self.scope)

    def routed(
        self, logits_TE: Tensor, bias_E: Tensor | None, slots: int, ids_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights of a step, `slots` wide whatever its band: what the operator does."""
        rule = self._rule(logits_TE.shape[0])
        padding_T = padding_rows(logits_TE.shape[0], self._sequence_parallel)
        ids, weights = self._choose(logits_TE, bias_E, rule, padding_T, ids_dtype)
        ids, weights = widened(ids, weights, slots)
        if self._statistics is not None:  # copies: the compiled step may write over what it got
            self._statistics.note(self.layer, ids.clone(), weights.clone(), padding_T)
        return ids, weights

    def _rule(self, rows: int) -> Rule:
        band = self.plan.band_for(max(1, step_rows(rows)))
        return Rule() if band is None else band.rules[self.layer]

    def _slots(self, rule: Rule) -> int:
        return self.plan.model.top_k if rule.top_k is None else rule.top_k


def step_rows(rows: int) -> int:
    """The rows of a step that decide its band: this rank's, or all data-parallel ranks' together.

    Padding counts: a captured step must not depend on what it is replayed with. That is the same
    number on all ranks, since they agree on it before a step.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return rows
    parallel = get_forward_context().dp_metadata
    return rows if parallel is None else int(parallel.num_tokens_across_dp_cpu.sum())


@torch.library.custom_op("leanmoe::route_vllm", mutates_args=())
def _route_op(
    logits: Tensor, bias: Tensor | None, number: int, slots: int, ids_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    ids, weights = _layers[number].routed(logits, bias, slots, ids_dtype)
    return weights, ids


@_route_op.register_fake
def _route_fake(
    logits: Tensor, bias: Tensor | None, number: int, slots: int, ids_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    del bias, number
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens, slots, dtype=torch.float32),
        logits.new_empty(tokens, slots, dtype=ids_dtype),
    )
