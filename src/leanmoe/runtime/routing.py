"""Which function routes: the reference, or a kernel where one can."""

from __future__ import annotations

from torch import Tensor

from leanmoe.kernels import route_cpu, why_not_route_cpu
from leanmoe.plan import Rule
from leanmoe.routers import Router
from leanmoe.routing import Routing, route


def fast_route(
    logits_STE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule,
    bias_E: Tensor | None = None,
    padding_ST: Tensor | None = None,
) -> Routing:
    """As `leanmoe.routing.route`, by the fastest function that agrees with it."""
    if why_not_route_cpu(logits_STE, router, rule):
        return route(logits_STE, router, top_k, rule, bias_E, padding_ST)
    return Routing(*route_cpu(logits_STE, router, top_k, rule, bias_E, padding_ST))
