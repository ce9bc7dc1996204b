"""A plan at work inside a Transformers model: where models, routing and kernels meet.

Shape suffixes: S sequences, N tokens of each in a forward call, T = S x N tokens, E experts, K
slots a token, D hidden width, B independent forward steps.
"""

from leanmoe.kernels.cpu.threads import release_threads
from leanmoe.runtime.apply import Applied, apply, has_kernel, served_experts
from leanmoe.runtime.counts import RoutingCounts
from leanmoe.runtime.model import (
    MoELayer,
    batching_reason,
    find_layers,
    load_model,
    partial_attention_reason,
    record,
    require_batching,
    resume_from,
    shape_of,
)
from leanmoe.runtime.transformers_experts import IMPLEMENTATION, register_experts

__all__ = [
    "IMPLEMENTATION",
    "Applied",
    "MoELayer",
    "RoutingCounts",
    "apply",
    "batching_reason",
    "find_layers",
    "has_kernel",
    "load_model",
    "partial_attention_reason",
    "record",
    "register_experts",
    "release_threads",
    "require_batching",
    "resume_from",
    "served_experts",
    "shape_of",
]
