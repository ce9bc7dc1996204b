"""One MoE layer's routing under a plan: what stands in place of vLLM's `_compute_routing`.

Letters: T tokens (rows of a step), E experts, K slots of a token, C copies of an expert at most.

On a GPU vLLM calls this from inside an operator of its own, so it runs as plain Python whenever a
step is run or captured. On a CPU torch.compile traces it: there all of it is one operator, which
looks the step up when it runs.

Where vLLM's load balancer (EPLB) holds several copies of an expert, it picks one by the row's
position, so a step of many rows reads every copy of a popular expert. While reading weights takes
the time, that is time lost: `OneCopy` has all rows of a step read one copy, as long as an expert's
rows are too few to fill a kernel's tile. Copies are equal, so are the outputs. Every rank that
computes the same rows picks the same copy, since the choice depends on vLLM's own tables alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import RowRoutes, choose_router, route_ids
from leanmoe.models.routers import Router
from leanmoe.plan import Plan, Rule
from leanmoe.routing import ALONE, BatchScope
from leanmoe.serve.plugin_options import is_plain
from leanmoe.serve.routing_statistics import RoutingStatistics
from leanmoe.serve.vllm.checks import expert_scale, ranking_bias, read_router, scaled
from leanmoe.serve.vllm.installation import version
from leanmoe.serve.vllm.padding import StepPadding
from leanmoe.serve.vllm.rule_rows import RuleRows, rules_by_band
from leanmoe.serve.vllm.small_steps import SHARE, Skipped, Skipping

_layers: WeakValueDictionary[int, VllmLayerRouting] = WeakValueDictionary()
"""The layers of this process by number. A compiled step holds no Python object: its operator gets
the number, and looks the layer up here."""
_numbers = itertools.count()


class VllmLayerRouting:
    """Routes one layer; an instance takes the place of its router's `_compute_routing`."""

    def __init__(
        self,
        router: Any,
        plan: Plan,
        layer: int,
        *,
        sequence_parallel: tuple[int, int] | None = None,
        is_full_width: bool = False,
        statistics: RoutingStatistics | None = None,
        scope: BatchScope = ALONE,
        padding: StepPadding | None = None,
        rule_rows: RuleRows | None = None,
    ) -> None:
        """Reads the layer's rules from the plan; `layer` counts MoE layers.

        `sequence_parallel` is (rank, ranks) where each rank has a share of a step's rows.
        `is_full_width` gives every step the model's own K slots. `scope` says where the layer's
        experts are, and how to hear of other ranks' tokens. `padding` reads the steps' padding, the
        slots of the KV cache where none is given. With `rule_rows` the rows of a step are under
        several rules: the layer's table says which.
        """
        self.plan, self.layer = plan, layer
        self._vllm, self._experts = router, plan.model.experts
        self._stock = router._compute_routing
        self._sequence_parallel = sequence_parallel
        self._is_full_width = is_full_width
        self._statistics = statistics
        self.scope = scope
        self._padding = StepPadding() if padding is None else padding
        self._rule_rows = rule_rows
        self._row_routes: RowRoutes | None = None
        """None where no row of the layer is under another rule than the others."""
        if rule_rows is not None and not all(rule.is_empty for rule in self.rules):
            bands = rules_by_band(plan, layer)
            self._row_routes = RowRoutes(bands, plan.model.top_k, scope.ranks)
        self.skipping = Skipping()
        """Set when the layer is loaded, and it is known what its experts do."""
        self.experts_in_place: Callable[[], bool] = lambda: True
        """Whether what `skipping` was settled for still stands in the layer's experts' place."""
        self._seen: tuple[torch.device, torch.dtype, torch.dtype] | None = None
        """Where the last step's logits were, their dtype, and that of its ids."""
        self._most_slots = max(self._slots(rule) for rule in self.rules)
        if self.by_table:
            self._most_slots = plan.model.top_k
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def rules(self) -> list[Rule]:
        """The layer's rule in each band of each level, the one beyond the last where that has an
        end, and that of prompt rows."""
        rules = [] if self.plan.levels else [Rule()]
        for level in self.plan.levels:
            rules += [band.rules[self.layer] for band in level.bands]
            if not level.bands or level.bands[-1].up_to is not None:
                rules.append(Rule())
            rules += [level.prompt[self.layer]] if level.prompt else []
        return rules

    @property
    def by_table(self) -> bool:
        """Whether the rows of a step are under several rules."""
        return self._row_routes is not None

    @property
    def is_plain(self) -> bool:
        """Whether vLLM's own routing does all of it."""
        return not self.by_table and all(map(is_plain, self.rules))

    @property
    def slots(self) -> set[int]:
        """The number of slots that a token has, under each of the layer's rules."""
        return {self._most_slots} if self.by_table else {self._slots(r) for r in self.rules}

    @property
    def may_skip(self) -> bool:
        """Whether a slot may hold an id that is no expert's: no, where ids leave the layer."""
        return not self._is_full_width

    @cached_property
    def router(self) -> Router:
        """How vLLM's own router chooses; read late, as rules of top_k alone do not need it."""
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
        rows, ids_dtype = router_logits.shape[0], indices_type or torch.int32
        if torch.compiler.is_compiling():
            bias, most = ranking_bias(self._vllm), self._most_slots
            traced: tuple[Tensor, Tensor] = _route_op(
                router_logits, bias, self._number, most, ids_dtype
            )
            return traced
        self._seen = router_logits.device, router_logits.dtype, ids_dtype
        rule = self._rule(rows)
        padding_T: Tensor | None = None
        if is_plain(rule):
            compute = self._vllms_own(rule)
            weights, ids = compute(hidden_states, router_logits, indices_type, input_ids=input_ids)
        else:
            padding_T = self._padding.rows(rows, self._sequence_parallel)
            skipped = self._skipped_id(rule, rows)
            ids, weights = self._route(router_logits, rule, padding_T, skipped, ids_dtype)
        if self._is_full_width:
            ids, weights = add_slots(ids, weights, self.plan.model.top_k)
        if self._statistics is not None:
            self._statistics.note(self.layer, ids, weights, padding_T)
        return weights, ids

    def implementations(self, logits_TE: Tensor) -> set[str]:
        """What routes such logits: vLLM, or one of leanmoe's."""
        if self._row_routes is not None:
            return {self._row_routes.choose(logits_TE, self.router, self.scope).name}
        return {
            "vllm"
            if is_plain(rule)
            else choose_router(logits_TE, self.router, rule, self.scope).name
            for rule in self.rules
        }

    def warm_up(self) -> None:
        """Launches what any step of the layer may, so that nothing compiles once vLLM serves.

        Launches differ by rule, by whether there is padding, and by what stands in a skipped slot,
        which steps of few rows may have otherwise. A layer of which no step was run compiles none.
        """
        if self._seen is None:
            return
        device, dtype, ids_dtype = self._seen
        for rule in {self._rule(0)} if self.by_table else self.rules:
            few = self._experts // (SHARE * max(1, self._slots(rule)))
            for rows in () if is_plain(rule) else sorted({1, 2, max(1, few), few + 1}):
                logits_TE = torch.zeros(rows, self._experts, dtype=dtype, device=device)
                for padding_T in (None, torch.zeros(rows, dtype=torch.bool, device=device)):
                    skipped = self._skipped_id(rule, rows)
                    self._route(logits_TE, rule, padding_T, skipped, ids_dtype)

    def _skipped_id(self, rule: Rule, rows: int) -> int | None:
        """The id of a skipped slot; None where the token's best repeats.

        Raises LeanMoeError where vLLM gave the layer new experts, which would read such an id as
        they please.
        """
        skipped = self.skipping.in_step(rule, rows, self._slots(rule), self._experts)
        if skipped is not Skipped.REPEATED and not self.experts_in_place():
            raise LeanMoeError(
                f"MoE layer {self.layer}: vLLM {version()} loaded its weights anew and gave it "
                "other experts than the plan was put to work in: start the engine again with those "
                "weights"
            )
        return skipped.id(self._experts)

    def groups_step(self, rows: int) -> bool:
        """Whether the slots of a step of `rows` rows are to be grouped by expert."""
        rule = self._rule(rows)
        return self.skipping.is_grouped(rule, rows, self._slots(rule), self._experts)

    def skips_step(self, rows: int) -> bool:
        """Whether slots of a step of `rows` rows may have an id that is no expert's, and no row."""
        rule = self._rule(rows)
        return not is_plain(rule) and self.skipping.usual is Skipped.MINUS_ONE

    def _vllms_own(self, rule: Rule) -> Callable[..., tuple[Tensor, Tensor]]:
        """vLLM's routing of this layer, with the rule's top-k."""
        router, stock = self._vllm, self._stock
        if rule.top_k not in (None, router.top_k):
            router = copy.copy(router)
            router.top_k = rule.top_k
            stock = type(router)._compute_routing.__get__(router)
        return stock  # type: ignore[no-any-return]

    def route_compiled(
        self, logits_TE: Tensor, bias_E: Tensor | None, slots: int, ids_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights of a compiled step, with `slots` slots whatever its band."""
        rule = self._rule(logits_TE.shape[0])
        padding_T = self._padding.rows(logits_TE.shape[0], self._sequence_parallel)
        ids, weights = self._route(logits_TE, rule, padding_T, None, ids_dtype, bias_E)
        ids, weights = add_slots(ids, weights, slots)
        if self._statistics is not None:  # copies: the compiled step may write over what it got
            self._statistics.note(self.layer, ids.clone(), weights.clone(), padding_T)
        return ids, weights

    def _route(
        self, logits_TE: Tensor, rule: Rule, padding_T: Tensor | None, skipped_id: int | None,
        ids_dtype: torch.dtype, bias_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Ids and weights of a step that leanmoe routes."""
        rows = logits_TE.shape[0]
        bias_E = ranking_bias(self._vllm) if bias_E is None else bias_E
        if self._rule_rows is None or self._row_routes is None:
            ids, weights = route_ids(
                logits_TE, self.router, self.plan.model.top_k, rule, bias_E, padding_T, self.scope,
                skipped_id=skipped_id, ids_dtype=ids_dtype,
            )  # fmt: skip
        else:
            rows_T = self._rule_rows.rows(rows, self._sequence_parallel)
            band_1 = self._rule_rows.band(step_rows(rows))
            ids, weights = self._row_routes.ids(
                logits_TE, self.router, rows_T, band_1, bias_E, padding_T, self.scope,
                skipped_id=skipped_id, ids_dtype=ids_dtype,
            )  # fmt: skip
        return ids, scaled(weights, ids, expert_scale(self._vllm))

    def _rule(self, rows: int) -> Rule:
        """A step's rule; by a table, what stands for all of its rules."""
        if self._row_routes is not None:
            return SHARING if self._row_routes.is_batch_aware else SKIPPING
        if len(self.plan.levels) > 1:  # without a table all levels leave the layer as it is
            return Rule()
        band = self.plan.band_for(max(1, step_rows(rows)))
        return Rule() if band is None else band.rules[self.layer]

    def _slots(self, rule: Rule) -> int:
        return self.plan.model.top_k if rule.top_k is None else rule.top_k


SHARING, SKIPPING = Rule(guaranteed=1), Rule(top_p=1.0)
"""Rules of the kinds that matter to how a step's slots are laid out."""


def add_slots(ids_TK: Tensor, weights_TK: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ids and weights with `slots` slots; added ones are skipped, and repeat the token's best."""
    missing = slots - ids_TK.shape[1]
    if missing <= 0:
        return ids_TK, weights_TK
    ids = torch.cat((ids_TK, ids_TK[:, :1].expand(-1, missing)), dim=1)
    return ids, functional.pad(weights_TK, (0, missing))


def step_rows(rows: int) -> int:
    """The rows of a step that decide its band: those of all data-parallel ranks, padding included.

    Padding counts because a captured step must not depend on what it is replayed with. The number
    is the same on all ranks, which agree on it before a step.
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
    ids, weights = _layers[number].route_compiled(logits, bias, slots, ids_dtype)
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


MOST_ROWS = 128
"""Rows up to which an expert's time is that of reading its weights."""
POPULARITY = 4
"""How many times its even share of a step's slots a popular expert is taken to get."""


class OneCopy:
    """Stands in the place of one router's `_apply_eplb_mapping`."""

    def __init__(self, router: Any) -> None:
        self._router, self._stock = router, router._apply_eplb_mapping

    @classmethod
    def put(cls, router: Any) -> None:
        """Lets vLLM call it from now on; a router without a load balancer keeps its own."""
        if getattr(router, "eplb_state", None) is not None:
            router._apply_eplb_mapping = cls(router)

    def __call__(self, topk_ids: Tensor) -> Tensor:
        """Physical ids (T,K) for logical ones; vLLM's mapping, which records the load as well."""
        state, rows = self._router.eplb_state, step_rows(topk_ids.shape[0])
        is_mapped = state is not None and state.logical_to_physical_map is not None
        experts = self._router.global_num_experts
        if not is_mapped or not reads_one_copy(rows, topk_ids.shape[1], experts):
            mapped: Tensor = self._stock(topk_ids)
            return mapped
        router = copy.copy(self._router)
        router.eplb_state = copy.copy(state)
        router.eplb_state.logical_to_physical_map = one_copy(
            state.logical_to_physical_map, state.logical_replica_count
        )
        return type(router)._apply_eplb_mapping(router, topk_ids)  # type: ignore[no-any-return]


def reads_one_copy(rows: int, slots: int, experts: int) -> bool:
    """Whether even a popular expert has so few rows in a step that one copy computes them."""
    return rows * slots * POPULARITY <= MOST_ROWS * experts


def one_copy(physical_EC: Tensor, copies_E: Tensor) -> Tensor:
    """vLLM's table of physical ids (E,C) with one copy of each expert in all of its columns.

    The copy is the first one's physical id modulo the number of copies: the first ones alone would
    leave the GPUs that hold few of them idle. It is computed anew at each step, since vLLM changes
    its table in place.
    """
    copies_E1 = copies_E.clamp(min=1).unsqueeze(1)
    choice_E1 = (physical_EC[:, :1] % copies_E1).long()
    return physical_EC.gather(1, choice_E1.expand_as(physical_EC))
