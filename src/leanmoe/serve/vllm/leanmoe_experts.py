"""leanmoe's own kernels in place of vLLM's Triton experts: LEANMOE_EXPERTS=leanmoe.

A skipped slot costs them nothing at any size of a step. What they cannot compute is refused.

Letters: T tokens (rows of a step), D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import Choice, Experts, ExpertWeights, Gate, choose_experts, experts_gpu
from leanmoe.serve.vllm.checks import triton_unsupported_reason

GATES = {
    "silu": Gate(),
    "gelu": Gate("gelu"),
    "gelu_tanh": Gate("gelu_tanh"),
    "swigluoai": Gate.gpt_oss(),
}
"""vLLM's names of the activations that leanmoe's kernels have."""
INTERLEAVED = ("swigluoai",)
"""The activations whose first product has gate and up columns in turn."""


def check_experts(runner: Any, name: str) -> None:
    """Refuses a loaded layer that leanmoe's kernels cannot compute."""
    if reason := kernels_unsupported_reason(runner):
        raise LeanMoeError(
            f"{name}: LEANMOE_EXPERTS=leanmoe cannot compute it: {reason}; unset LEANMOE_EXPERTS"
        )


def kernels_unsupported_reason(runner: Any) -> str | None:
    """Why leanmoe's kernels cannot compute a loaded layer; None if they can."""
    if reason := triton_unsupported_reason(runner):
        return f"{reason}, not TritonExperts alone on one GPU (--moe-backend triton)"
    layer = runner.routed_experts
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    if config.quant_dtype is not None or config.w1_scale is not None:
        return f"its weights are quantised by {type(layer.quant_method).__name__}"
    activation = str(layer.activation.value)
    if activation not in GATES:
        return f"its activation is {activation}"
    if activation not in INTERLEAVED and config.gemm1_clamp_limit is not None:
        return f"its {activation} is clamped"
    if layer.apply_router_weight_on_input:
        return "its routing weights go to the input"
    choice = kernels_for(layer)
    return None if choice.name == "gpu" else choice.reason


def kernels_for(layer: Any) -> Choice[Experts]:
    """What computes a loaded layer's experts on a GPU in leanmoe, and why it is that."""
    return choose_experts(weights_of(layer), "cuda")


def weights_of(layer: Any) -> ExpertWeights:
    """A loaded layer's weights, where they lie."""
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    activation = str(layer.activation.value)
    return ExpertWeights(
        gate_up=layer.w13_weight.data,
        down=layer.w2_weight.data,
        gate_up_bias=config.w1_bias,
        down_bias=config.w2_bias,
        is_concatenated=activation not in INTERLEAVED,
        gate=GATES[activation],
    )


def warm_up(layer: Any, rows: int, slots: int) -> None:
    """Compiles what a loaded layer's step of so many rows and slots launches."""
    weights = weights_of(layer)
    experts, hidden = weights.down.shape[0], layer.w2_weight.shape[1]
    hidden_TD = weights.down.new_zeros(rows, hidden)
    ids_TK = torch.arange(rows * slots, device=hidden_TD.device).remainder(experts)
    gates_TK = torch.ones(rows, slots, device=hidden_TD.device)
    experts_gpu(hidden_TD, ids_TK.view(rows, slots).int(), gates_TK, weights)


class LeanmoeExperts:
    """Stands in the place of `TritonExperts.apply`."""

    def __init__(self, runner: Any) -> None:
        self._layer = runner.routed_experts
        self.stock = self._layer.quant_method.moe_kernel.fused_experts.apply

    def __call__(
        self,
        *,
        output: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        **_others: Any,
    ) -> None:
        """Writes each row's weighted sum (T,D) to `output`."""
        experts_gpu(hidden_states, topk_ids, topk_weights, weights_of(self._layer), out=output)

    def put(self) -> None:
        """Lets vLLM call it from now on."""
        self._layer.quant_method.moe_kernel.fused_experts.apply = self

    def is_in_place(self) -> bool:
        """Whether vLLM still calls it: weights that are loaded anew may come with new experts."""
        return self._layer.quant_method.moe_kernel.fused_experts.apply is self
