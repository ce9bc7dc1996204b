"""How experts are chosen and computed: fast implementations, each beside a torch reference.

Those that compute take `(hidden_TD, ids_TK, weights_TK, weights: ExpertWeights)` and return
(T,D). An id equal to the number of experts is a skipped slot: no row is computed, no weight read.
"""

from leanmoe.kernels.choose import Choice, Experts, choose_experts, choose_route
from leanmoe.kernels.cpu import experts_cpu
from leanmoe.kernels.reference import experts_reference
from leanmoe.kernels.route_cpu import route_cpu
from leanmoe.kernels.weights import ExpertWeights, Gate
from leanmoe.kernels.work import Work, count_work

__all__ = [
    "Choice",
    "ExpertWeights",
    "Experts",
    "Gate",
    "Work",
    "choose_experts",
    "choose_route",
    "count_work",
    "experts_cpu",
    "experts_reference",
    "route_cpu",
]
