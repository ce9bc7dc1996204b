"""How the chosen experts are computed: fast implementations, each beside a torch reference.

All take `(hidden_TD, ids_TK, weights_TK, weights: ExpertWeights)` and return (T,D). An id equal
to the number of experts is a skipped slot: no row is computed, no weight is read.
"""

from leanmoe.kernels.choose import Choice, Experts, choose_experts
from leanmoe.kernels.cpu import experts_cpu
from leanmoe.kernels.reference import experts_reference
from leanmoe.kernels.weights import ExpertWeights, Gate
from leanmoe.kernels.work import Work, count_work

__all__ = [
    "Choice",
    "ExpertWeights",
    "Experts",
    "Gate",
    "Work",
    "choose_experts",
    "count_work",
    "experts_cpu",
    "experts_reference",
]
