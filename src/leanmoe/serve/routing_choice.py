"""Which function routes for an engine, and one step's routing as its kernels want it.

Letters: T rows of a step, E experts, K slots a token.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from leanmoe.kernels import (
    route_cpu,
    route_gpu_ids,
    why_not_route_cpu,
    why_not_route_gpu,
)
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import ALONE, BatchScope, route
from leanmoe.serve.skipped_slots import Skipped, spelled


def implementation(logits_TE: Tensor, router: Router, rule: Rule, scope: BatchScope = ALONE) -> str:
    """Which routing function runs: "gpu", "cpu" or "reference"."""
    rule = rule.on(scope.ranks)
    if logits_TE.is_cuda:
        has_triton = find_spec("triton") is not None
        can = has_triton and why_not_route_gpu(logits_TE, router, rule) is None
        return "gpu" if can else "reference"
    if rule.is_batch_aware and scope.exchange is not None:
        return "reference"
    has_numba = find_spec("numba") is not None
    can = has_numba and why_not_route_cpu(logits_TE, router, rule) is None
    return "cpu" if can else "reference"


def is_plain(rule: Rule) -> bool:
    """Whether an engine's own routing, with another top-k at most, does what the rule says.

    With fewer experts and `keep_weights` it does not: it normalises the weights anew.
    """
    return rule.is_empty or rule == Rule(top_k=rule.top_k)


def choose(
    logits_TE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule,
    bias_E: Tensor | None,
    padding_T: Tensor | None,
    ids_dtype: torch.dtype,
    skipped: Skipped = Skipped.REPEATED,
    scope: BatchScope = ALONE,
) -> tuple[Tensor, Tensor]:
    """Ids and float32 weights (T,K) under a rule, its skipped slots as `skipped` says."""
    rule = rule.on(scope.ranks)
    bias_E = None if bias_E is None else bias_E.detach()
    arguments = (logits_TE, router, top_k, rule, bias_E, padding_T)
    name, experts = implementation(logits_TE, router, rule, scope), logits_TE.shape[1]
    if name == "gpu":
        skipped_id = None if skipped is Skipped.REPEATED else skipped.id(experts)
        on_gpu = (*arguments, scope.placement, scope.exchange)
        return route_gpu_ids(*on_gpu, skipped_id=skipped_id, ids_dtype=ids_dtype)
    if name == "cpu":
        ids, weights, _over_budget = route_cpu(*arguments)
    else:
        ids, weights, _over_budget = route(*arguments, scope)
    return spelled(ids, experts, padding_T, skipped).to(ids_dtype), weights.float()
