"""CPU experts: rows sorted by expert, one pass over the experts that are awake."""

from __future__ import annotations

from torch import Tensor

from leanmoe.kernels.reference import experts_reference
from leanmoe.kernels.weights import ExpertWeights


def experts_cpu(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Same as `experts_reference`, which it still calls; the kernel takes its place next."""
    return experts_reference(hidden_TD, ids_TK, weights_TK, weights)
