"""Which function routes: the reference, or a kernel where one can."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from leanmoe.kernels import route_cpu, route_gpu, why_not_route_cpu, why_not_route_gpu
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import ALONE, Company, Routing, route


def fast_route(
    logits_STE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule,
    bias_E: Tensor | None = None,
    padding_ST: Tensor | None = None,
    company: Company = ALONE,
) -> Routing:
    """As `leanmoe.routing.route`, by the fastest function that agrees with it."""
    rule = rule.on(company.ranks)
    if logits_STE.device.type == "cuda":
        return _on_gpu(logits_STE, router, top_k, rule, bias_E, padding_ST, company)
    if company.exchange is not None or rule.budget_per_rank is not None:
        return route(logits_STE, router, top_k, rule, bias_E, padding_ST, company)
    if why_not_route_cpu(logits_STE, router, rule):
        return route(logits_STE, router, top_k, rule, bias_E, padding_ST)
    return Routing(*route_cpu(logits_STE, router, top_k, rule, bias_E, padding_ST))


def _on_gpu(
    logits_STE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule,
    bias_E: Tensor | None,
    padding_ST: Tensor | None,
    company: Company,
) -> Routing:
    """One step in one or two launches; many steps, which only scoring has, by the reference."""
    is_one = logits_STE.dim() == 3 and logits_STE.shape[0] == 1
    logits_TE = logits_STE[0] if is_one else logits_STE
    if find_spec("triton") is None or why_not_route_gpu(logits_TE, router, rule):
        return route(logits_STE, router, top_k, rule, bias_E, padding_ST, company)
    padding_T = padding_ST[0] if is_one and padding_ST is not None else padding_ST
    found = route_gpu(
        logits_TE, router, top_k, rule, bias_E, padding_T, company.placement, company.exchange
    )
    if not is_one:
        return Routing(found.ids_TK, found.weights_TK, found.over_budget)
    over_S = None if found.over_budget is None else found.over_budget[None]
    return Routing(found.ids_TK[None], found.weights_TK[None], over_S)
