"""leanmoe's own kernels in place of vLLM's Triton experts: LEANMOE_EXPERTS=leanmoe.

A skipped slot costs them nothing at any size of a step. What they cannot compute is refused.

Letters: T rows of a step, K slots a token, E experts, D hidden width, M expert width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, Gate, experts_gpu, why_not_gpu
from leanmoe.serve.vllm.skipping import why_not_plain_triton

GATES = {
    "silu": Gate(),
    "gelu": Gate("gelu"),
    "gelu_tanh": Gate("gelu_tanh"),
    "swigluoai": Gate.gpt_oss(),
}
"""vLLM's activations that leanmoe's kernels have, by their names there."""
INTERLEAVED = ("swigluoai",)
"""Those whose first product has gate and up in turn."""


def check_experts(runner: Any, name: str) -> None:
    """Refuses a loaded layer that leanmoe's kernels cannot compute."""
    if reason := why_not_ours(runner):
        raise LeanMoeError(
            f"{name}: LEANMOE_EXPERTS=leanmoe cannot compute it: {reason}; unset LEANMOE_EXPERTS"
        )


def why_not_ours(runner: Any) -> str | None:
    """Why leanmoe's kernels cannot compute a loaded layer; None if they can."""
    if reason := why_not_plain_triton(runner):
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
    return why_not_gpu(weights_of(layer))


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


class OwnExperts:
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
