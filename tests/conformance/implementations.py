"""Everything that decides which experts a token gets, as one table: each must be the reference.

Letters: B steps routed apart, T tokens of a step, E experts, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmoe.kernels import route_cpu_unsupported, route_gpu_unsupported
from leanmoe.kernels.dispatch import route_on_cpu, route_on_gpu
from leanmoe.plan import Fingerprint, Plan
from leanmoe.routing import BatchScope, Routing, route, score
from leanmoe.serve.plugin_options import is_plain
from leanmoe.serve.sglang.routing import planned_config
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.padding import PaddingSource, StepPadding
from tests.conformance import loops
from tests.conformance.cases import Case
from tests.serve.sglang.test_patch import TopKConfig
from tests.serve.stand_ins import FusedTopKRouter, install_context

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu"
"""Whether Triton's programs run in its interpreter: a tenth of a second for a token."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of a rule's meaning."""

    route: Callable[[Case], Routing]
    unsupported: Callable[[Case], str | None]
    """Why it cannot route a case, in the words of the code itself where it has some."""
    examples: int
    """How many random cases are tried."""
    takes_steps: bool = True
    """Whether it routes several steps in one call."""
    repeats: bool = False
    """Whether a skipped slot names the token's best expert again, with weight 0."""


def arguments(case: Case, device: str = "cpu") -> tuple[Any, ...]:
    """What `route` is called with."""
    logits_BTE, bias_E, padding_BT = (
        None if x is None else x.to(device) for x in (case.logits_BTE, case.bias_E, case.padding_BT)
    )
    return logits_BTE, case.router, case.top_k, case.rule, bias_E, padding_BT, scope_of(case)


def scope_of(case: Case) -> BatchScope:
    return BatchScope(case.placement)


def by_reference(case: Case) -> Routing:
    return route(*arguments(case))


def by_loops(case: Case) -> Routing:
    """Ids from the loops of `loops.py`; each token's weights from its experts' gates."""
    rule, router = case.rule, case.router
    gates_BTE, ranking_BTE = score(case.logits_BTE, router, case.bias_E, rule.experts)
    is_after = router.scoring == "softmax_after_top_k"
    masses_BTE = gates_BTE.double()
    if is_after:
        masses_BTE = (masses_BTE - masses_BTE.amax(dim=-1, keepdim=True)).exp()
    padding_BT = case.padding_BT
    if padding_BT is None:
        padding_BT = torch.zeros(gates_BTE.shape[:2], dtype=torch.bool)
    rank_of = None if case.placement is None else case.placement.rank_of
    normalise = router.normalise or is_after
    steps = [
        loops.run(
            masses, ranking, case.slots, rule, padding, normalise, rank_of, router.zero_experts
        )
        for masses, ranking, padding in zip(
            masses_BTE.tolist(), ranking_BTE.tolist(), padding_BT.tolist(), strict=True
        )
    ]
    ids_BTK = torch.full((*gates_BTE.shape[:2], case.slots), case.experts)
    weights_BTK = torch.zeros(ids_BTK.shape)
    for b, step in enumerate(steps):
        for t, experts in enumerate(step.experts):
            if experts:
                ranked, best = ranking_BTE[b, t].topk(min(case.top_k, case.experts))
                whole = best[ranked > float("-inf")].tolist()
                kept_sum, whole_sum = (
                    float(masses_BTE[b, t, ids].sum()) + router.normalise_epsilon
                    for ids in (experts, whole)
                )
                total = kept_sum**rule.renormalise * whole_sum ** (1 - rule.renormalise)
                own = masses_BTE[b, t, experts] / (total if normalise and total > 0 else 1.0)
                ids_BTK[b, t, : len(experts)] = torch.tensor(experts)
                weights_BTK[b, t, : len(experts)] = (own * router.scaling).float()
    has_budget = rule.budget is not None or rule.budget_per_rank is not None
    over_B = torch.tensor([step.over_budget for step in steps]) if has_budget else None
    return Routing(ids_BTK, weights_BTK, over_B)


def by_cpu(case: Case) -> Routing:
    return route_on_cpu(*arguments(case))


def by_triton(case: Case) -> Routing:
    routing = route_on_gpu(*arguments(case, DEVICE))
    return Routing(*(None if x is None else x.cpu() for x in routing))  # type: ignore[arg-type]


def by_vllm(case: Case) -> Routing:
    """vLLM's hook, with stand-ins of the router in whose place it works and of vLLM's step."""
    stock = FusedTopKRouter()
    stock.e_score_correction_bias = case.bias_E  # type: ignore[attr-defined]
    fingerprint = Fingerprint("Model", 1, 1, case.experts, case.top_k)
    plan = Plan.uniform(fingerprint, case.rule)
    marked = StepPadding(PaddingSource.MARKED)
    hook = VllmLayerRouting(stock, plan, 0, scope=scope_of(case), padding=marked)
    hook.__dict__["router"] = case.router
    step = SimpleNamespace(is_padding=case.padding_BT, dp_metadata=None)
    with pytest.MonkeyPatch.context() as patch:
        install_context(patch, step)
        weights, ids = hook(torch.empty(len(case.logits_BTE), 1), case.logits_BTE, torch.int64)
    return Routing(ids, weights, None)


def by_sglang(case: Case) -> Routing:
    """SGLang's hook: the custom routing function that it puts into the layer's config."""
    router = case.router
    config = TopKConfig(
        top_k=case.top_k,
        use_grouped_topk=router.groups > 1,
        topk_group=router.groups_used,
        num_expert_group=router.groups,
        renormalize=router.normalise,
        correction_bias=case.bias_E,
        scoring_func=router.scoring,
    )
    tokens = None if case.padding_BT is None else (~case.padding_BT).sum()
    custom = planned_config(config, case.rule, case.top_k, tokens).custom_routing_function
    weights, ids = custom(None, case.logits_BTE, case.slots, router.normalise)
    return Routing(ids.long(), weights * router.scaling, None)


def _cpu_unsupported(case: Case) -> str | None:
    return route_cpu_unsupported(case.logits_BTE, case.router, case.rule.on(scope_of(case).ranks))


def _triton_unsupported(case: Case) -> str | None:
    there = case.logits_BTE.to(DEVICE)
    return route_gpu_unsupported(there, case.router, case.rule.on(scope_of(case).ranks))


def _vllm_unsupported(case: Case) -> str | None:
    return "vLLM's own routing runs it" if is_plain(case.rule) else None


def _sglang_unsupported(case: Case) -> str | None:
    if is_plain(case.rule):
        return "SGLang's own routing runs it"
    if case.router.zero_experts:
        return "SGLang's hook knows no identities"
    if case.router.scoring not in ("softmax", "sigmoid"):
        return f"it scores by {case.router.scoring}: only top_k alone can run here"
    if case.placement is not None:
        return "SGLang's hook knows no ranks"
    padding = case.padding_BT
    if padding is not None and not bool((padding[1:] >= padding[:-1]).all()):
        return "SGLang's padding rows are its last"
    return None


IMPLEMENTATIONS = {
    "loops": Implementation(by_loops, lambda _: None, 100),
    "cpu": Implementation(by_cpu, _cpu_unsupported, 150),
    "triton": Implementation(
        by_triton, _triton_unsupported, 6 if IS_INTERPRETED else 100, takes_steps=False
    ),
    "vllm": Implementation(by_vllm, _vllm_unsupported, 40, takes_steps=False, repeats=True),
    "sglang": Implementation(by_sglang, _sglang_unsupported, 40, takes_steps=False, repeats=True),
}
"""By name. The reference itself is what the others are compared with; the loops are independent."""


def one_step(case: Case) -> Case:
    """The first of a case's steps."""
    if case.logits_BTE.dim() == 2:
        return case
    padding = None if case.padding_BT is None else case.padding_BT[0]
    return replace(case, logits_BTE=case.logits_BTE[0], padding_BT=padding)
