"""Small stand-ins for what vLLM's objects look like to the plugin, where vLLM is not installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class BaseRouter:
    """The seam: all that the plugin replaces."""

    top_k = 4
    global_num_experts = 16
    scoring_func = "softmax"
    renormalize = True

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        del hidden_states, input_ids
        weights, ids = router_logits.float().softmax(-1).topk(self.top_k)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids.to(indices_type or torch.int32)


class FusedTopKRouter(BaseRouter):
    """vLLM's plain router."""


class GroupedTopKRouter(BaseRouter):
    """vLLM's router of DeepSeek."""

    scoring_func = "sigmoid"
    num_expert_group, topk_group = 4, 2
    routed_scaling_factor = 2.5
    e_score_correction_bias = torch.zeros(16)


class CustomRoutingRouter(BaseRouter):
    """A router that is some function."""


@dataclass
class Context:
    """A forward context of an older vLLM."""

    slot_mapping: Any = field(default_factory=dict)
    dp_metadata: Any = None
    additional_kwargs: dict[str, Any] = field(default_factory=dict)


def install_context(monkeypatch: pytest.MonkeyPatch, context: Any) -> None:
    """Makes `vllm.forward_context` hand out `context`; None for no step."""
    module = ModuleType("vllm.forward_context")
    module.get_forward_context = lambda: context  # type: ignore[attr-defined]
    module.is_forward_context_available = lambda: context is not None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)


def ranks(*tokens: int) -> SimpleNamespace:
    """What vLLM knows of data-parallel ranks in a step."""
    return SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor(tokens))


def loaded_runner(
    experts: str = "TritonExperts", activation: str = "silu", **settings: Any
) -> SimpleNamespace:
    """A MoE layer that vLLM has loaded on one GPU, unquantised where `settings` say no other."""
    module = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
    loaded = type(experts, (), {"__module__": module, "apply": None})()
    names = ("quant_dtype", "w1_scale", "gemm1_clamp_limit", "w1_bias", "w2_bias")
    loaded.quant_config = SimpleNamespace(
        **{name: settings.get(name) for name in names},
        use_int8_w8a16=settings.get("use_int8_w8a16", False),
        use_int4_w4a16=settings.get("use_int4_w4a16", False),
    )
    impl = SimpleNamespace(fused_experts=loaded)
    kernel = SimpleNamespace(impl=impl, fused_experts=loaded)
    return SimpleNamespace(
        router=SimpleNamespace(eplb_state=settings.get("eplb_state")),
        routed_experts=SimpleNamespace(
            quant_method=SimpleNamespace(moe_kernel=kernel),
            expert_map=settings.get("expert_map"),
            activation=SimpleNamespace(value=activation),
            apply_router_weight_on_input=settings.get("apply_router_weight_on_input", False),
        ),
        moe_config=SimpleNamespace(
            is_lora_enabled=settings.get("is_lora_enabled", False),
            dp_size=settings.get("dp_size", 1),
            pcp_size=settings.get("pcp_size", 1),
            is_sequence_parallel=settings.get("is_sequence_parallel", False),
        ),
    )
