"""Which implementation computes a layer's experts, and which routes: by name, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Generic, Literal, NamedTuple, TypeVar

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.kernels.cpu.experts import experts_cpu, experts_cpu_unsupported, prepare
from leanmoe.kernels.cpu.router import route_cpu, route_cpu_unsupported
from leanmoe.kernels.reference import experts_reference
from leanmoe.kernels.rule_words import DeviceRules, TokenRules, needed
from leanmoe.kernels.triton.experts import experts_gpu, experts_gpu_unsupported
from leanmoe.kernels.triton.router import route_gpu, route_gpu_ids, route_gpu_unsupported
from leanmoe.kernels.triton.tuned_tiles import describe
from leanmoe.kernels.weights import ExpertWeights
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import ALONE, BatchScope, Routing, RuleTable, route, route_rows

Experts = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
"""`(hidden_TD, ids_TK, weights_TK, weights) -> out_TD`."""
Route = Callable[
    [Tensor, Router, int, Rule | TokenRules, Tensor | None, Tensor | None, BatchScope],
    Routing,
]
"""`(logits_BTE, router, top_k, rule, bias_E, padding_BT, scope) -> Routing`."""
Function = TypeVar("Function")

SHARE_OF_FREE_MEMORY = 0.5
"""A layer's packed copy may take this share of what is free; layers are chosen one by one."""


class Choice(NamedTuple, Generic[Function]):
    """The implementation that will run, and why it is that one."""

    name: Literal["gpu", "cpu", "reference"]
    function: Function
    reason: str


def choose_experts(weights: ExpertWeights, device: torch.device | str) -> Choice[Experts]:
    """The fastest implementation for these weights on this device, and why it is that one.

    Prepares it too (packs the weights, compiles), so that the first call is as fast as the rest.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        reason = (
            experts_gpu_unsupported(weights)
            if _is_installed("triton")
            else "triton is not installed"
        )
        if reason is None:
            return Choice("gpu", experts_gpu, describe(weights))
    elif kind == "cpu":
        reason = experts_cpu_unsupported(weights) or _lacks_memory(weights)
        if reason is None:
            return Choice("cpu", experts_cpu, prepare(weights).describe())
    else:
        reason = f"no kernel for {kind}"
    return Choice("reference", experts_reference, reason)


def _lacks_memory(weights: ExpertWeights) -> str | None:
    needed = sum(w.numel() * w.element_size() for w in (weights.gate_up, weights.down))
    free = psutil.virtual_memory().available
    if needed <= free * SHARE_OF_FREE_MEMORY:
        return None
    return (
        f"the kernel's packed copy of a layer needs {needed / 1e9:.1f} GB "
        f"and {free / 1e9:.1f} GB are free"
    )


def choose_router(
    logits_BTE: Tensor,
    router: Router,
    rule: Rule | TokenRules,
    scope: BatchScope = ALONE,
    device: torch.device | str | None = None,
) -> Choice[Route]:
    """The fastest function that routes such logits as `leanmoe.routing.route` does, or, where each
    token has a rule row of its own, as `leanmoe.routing.route_rows` does.

    A GPU's kernel routes one step; many steps at once, which only scoring has, are the reference's.
    `device` is where the logits are, unless they are stand-ins of their shape and dtype.
    """
    rule = _on_ranks(rule, scope.ranks)
    if torch.device(device or logits_BTE.device).type == "cuda":
        reason: str | None = "triton is not installed"
        if _is_installed("triton"):
            reason = route_gpu_unsupported(_one_step(logits_BTE), router, rule)
        if reason is None:
            return Choice("gpu", route_on_gpu, "one step of logits on a GPU")
    else:
        reason = "numba is not installed"
        if _is_installed("numba"):
            reason = route_cpu_unsupported(logits_BTE, router, rule)
        if reason is None and scope.exchange is not None and needed(rule).is_batch_aware:
            reason = "ranks exchange what their tokens ask for"
        if reason is None:
            return Choice("cpu", route_on_cpu, "logits on a CPU")
    return Choice("reference", route_by_reference, reason)


def _on_ranks(rule: Rule | TokenRules, ranks: int) -> Rule | TokenRules:
    """A table is made for its number of ranks, a rule for any."""
    if isinstance(rule, TokenRules):
        rule.rules.check_ranks(ranks)
        return rule
    return rule.on(ranks)


def fast_route(
    logits_BTE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules,
    bias_E: Tensor | None = None, padding_BT: Tensor | None = None, scope: BatchScope = ALONE,
) -> Routing:  # fmt: skip
    """What `leanmoe.routing.route` gives, by the function that `choose_router` chooses."""
    if scope.placement is not None:
        scope.placement.check(logits_BTE.shape[-1])
    function = choose_router(logits_BTE, router, rule, scope).function
    return function(logits_BTE, router, top_k, rule, bias_E, padding_BT, scope)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _one_step(logits_BTE: Tensor) -> Tensor:
    """The logits (T,E) of the only step, or what there is where there are more steps."""
    return logits_BTE[0] if logits_BTE.dim() == 3 and logits_BTE.shape[0] == 1 else logits_BTE


def route_by_reference(
    logits_BTE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules,
    bias_E: Tensor | None, padding_BT: Tensor | None, scope: BatchScope,
) -> Routing:  # fmt: skip
    """`leanmoe.routing.route`, or `route_rows` as wide as the kernels write it."""
    if isinstance(rule, Rule):
        return route(logits_BTE, router, top_k, rule, bias_E, padding_BT, scope)
    rules, rows_BT = rule
    step = (logits_BTE, router, top_k, rules.table, rows_BT, bias_E, padding_BT, scope)
    ids_BTK, weights_BTK, over_budget_B = route_rows(*step)
    more = (0, rules.needs.slots - ids_BTK.shape[-1])
    ids_BTK = functional.pad(ids_BTK, more, value=logits_BTE.shape[-1])
    return Routing(ids_BTK, functional.pad(weights_BTK, more), over_budget_B)


def route_on_cpu(
    logits_BTE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules, bias_E: Tensor | None,
    padding_BT: Tensor | None, scope: BatchScope,
) -> Routing:  # fmt: skip
    """`route_cpu` in the place of `leanmoe.routing.route`; all experts are on one rank."""
    rule = _on_ranks(rule, scope.ranks)
    return route_cpu(logits_BTE, router, top_k, rule, bias_E, padding_BT)


def route_on_gpu(
    logits_BTE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules, bias_E: Tensor | None,
    padding_BT: Tensor | None, scope: BatchScope,
) -> Routing:  # fmt: skip
    """`route_gpu` in the place of `leanmoe.routing.route`, for one step: (T,E) or (1,T,E)."""
    logits_TE = _one_step(logits_BTE)
    has_steps = logits_TE.dim() < logits_BTE.dim()
    padding_T = padding_BT[0] if has_steps and padding_BT is not None else padding_BT
    if has_steps and isinstance(rule, TokenRules):
        rule = rule._replace(rule_rows_BT=rule.rule_rows_BT[0])
    routed = route_gpu(
        logits_TE, router, top_k, rule, bias_E, padding_T, scope.placement, scope.exchange
    )
    if not has_steps:
        return Routing(routed.ids_TK, routed.weights_TK, routed.over_budget)
    over_B = None if routed.over_budget is None else routed.over_budget[None]
    return Routing(routed.ids_TK[None], routed.weights_TK[None], over_B)


def route_ids(
    logits_TE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule | TokenRules,
    bias_E: Tensor | None = None,
    padding_T: Tensor | None = None,
    scope: BatchScope = ALONE,
    *,
    skipped_id: int | None = None,
    ids_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """One step's ids and float32 weights (T,K) for another engine's kernels, as fast as can be.

    `skipped_id` is the id of every skipped slot, for kernels that pass over it. For kernels that
    want an expert in every slot it is None: a skipped slot repeats as `repeat_best` says.
    """
    experts, rule = logits_TE.shape[1], _on_ranks(rule, scope.ranks)
    bias_E = None if bias_E is None else bias_E.detach()
    choice = choose_router(logits_TE, router, rule, scope)
    step = (logits_TE, router, top_k, rule, bias_E, padding_T)
    if choice.name == "gpu":  # its kernel writes skipped slots itself
        ranks = (scope.placement, scope.exchange)
        return route_gpu_ids(*step, *ranks, skipped_id=skipped_id, ids_dtype=ids_dtype)
    ids_TK, weights_TK, _over_budget = choice.function(*step, scope)
    ids_TK = write_skipped(ids_TK, experts, padding_T, skipped_id)
    return ids_TK.to(ids_dtype), weights_TK.float()


class RowRoutes:
    """One layer's rules, under which each token of a step has a rule row, for every band.

    Rules and rows are data: a step that a graph captured follows what they are when it runs.
    """

    def __init__(
        self, bands: Sequence[Sequence[tuple[Rule, Rule | None]]], top_k: int, ranks: int = 1
    ) -> None:
        """`bands` hold what `RuleTable.of` takes: for each level a reply and a prompt rule."""
        self._top_k, self._ranks = top_k, ranks
        self._tables = [RuleTable.of(top_k, levels).on(ranks) for levels in bands]
        self._rules: DeviceRules | None = None
        """On the device of the first step, which no graph captures."""

    @property
    def is_batch_aware(self) -> bool:
        """Whether some token's experts depend on the other tokens in its step."""
        return any(table.is_batch_aware for table in self._tables)

    def ids(
        self, logits_TE: Tensor, router: Router, rule_rows_T: Tensor, band_1: Tensor,
        bias_E: Tensor | None = None, padding_T: Tensor | None = None, scope: BatchScope = ALONE,
        *, skipped_id: int | None = None, ids_dtype: torch.dtype = torch.int32,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `route_ids` gives, each token under its row of the table of band `band_1`.

        On a GPU, where the band is not known before the step runs, the reference routes by all.
        """
        if self._rules is None:
            self._rules = self._made(logits_TE, router, logits_TE.device)
        if band_1.is_cuda and self.choose(logits_TE, router, scope).name == "reference":
            step = (rule_rows_T, bias_E, padding_T, scope)
            tables = self._tables
            routed = [route_rows(logits_TE, router, self._top_k, table, *step) for table in tables]
            ids_TK = torch.stack([each.ids_BTK for each in routed])[band_1.long()][0]
            weights_TK = torch.stack([each.weights_BTK for each in routed])[band_1.long()][0]
            ids_TK = write_skipped(ids_TK, logits_TE.shape[1], padding_T, skipped_id)
            return ids_TK.to(ids_dtype), weights_TK.float()
        self._rules.band_1 = band_1
        return route_ids(
            logits_TE, router, self._top_k, TokenRules(self._rules, rule_rows_T), bias_E,
            padding_T, scope, skipped_id=skipped_id, ids_dtype=ids_dtype,
        )  # fmt: skip

    def choose(self, logits_TE: Tensor, router: Router, scope: BatchScope = ALONE) -> Choice[Route]:
        """What routes such logits, and why it is that."""
        rows_T = torch.empty(logits_TE.shape[0], dtype=torch.int32, device=logits_TE.device)
        rules = self._rules or self._made(logits_TE, router, "cpu")  # which is not kept
        return choose_router(logits_TE, router, TokenRules(rules, rows_T), scope)

    def _made(self, logits_TE: Tensor, router: Router, device: torch.device | str) -> DeviceRules:
        experts = logits_TE.shape[1]
        return DeviceRules(self._tables, router, self._top_k, experts, device, ranks=self._ranks)


def write_skipped(
    ids_TK: Tensor, experts: int, padding_T: Tensor | None, skipped_id: int | None
) -> Tensor:
    """`ids_TK` with `skipped_id` in each skipped slot, whose id is E; None repeats the best."""
    if skipped_id is None:
        return repeat_best(ids_TK, experts, padding_T)
    return ids_TK.masked_fill(ids_TK >= experts, skipped_id)


def repeat_best(ids_TK: Tensor, experts: int, padding_T: Tensor | None = None) -> Tensor:
    """`ids_TK` with each skipped slot, whose id is E, naming an expert that is active anyway.

    A token's skipped slots name its own best expert, those of padding the first token's best, and
    expert 0 where there is none. `route_gpu_ids` writes the same inside its kernel.
    """
    best_T1 = ids_TK[:, :1]
    best_T1 = best_T1.masked_fill(best_T1 >= experts, 0)
    if padding_T is not None:
        best_T1 = torch.where(padding_T.unsqueeze(-1), best_T1[:1], best_T1)
    return torch.where(ids_TK < experts, ids_TK, best_T1)
