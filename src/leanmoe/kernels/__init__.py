"""How experts are chosen and computed: fast implementations, each beside a torch reference.

Those that compute take `(hidden_TD, ids_TK, weights_TK, weights: ExpertWeights)` and return
(T,D). An id equal to the number of experts is a skipped slot: no row is computed, no weight read.
"""

from leanmoe.kernels.cpu.experts import experts_cpu
from leanmoe.kernels.cpu.router import route_cpu, route_cpu_unsupported
from leanmoe.kernels.dispatch import Choice, Experts, choose_experts, choose_router
from leanmoe.kernels.reference import expert_rows, experts_reference
from leanmoe.kernels.triton.experts import experts_gpu
from leanmoe.kernels.triton.router import route_gpu, route_gpu_unsupported
from leanmoe.kernels.weights import ExpertWeights, Gate
from leanmoe.kernels.work import count_work

__all__ = [
    "Choice",
    "ExpertWeights",
    "Experts",
    "Gate",
    "choose_experts",
    "choose_router",
    "count_work",
    "expert_rows",
    "experts_cpu",
    "experts_gpu",
    "experts_reference",
    "route_cpu",
    "route_cpu_unsupported",
    "route_gpu",
    "route_gpu_unsupported",
]
