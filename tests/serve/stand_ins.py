"""Small stand-ins for what vLLM's objects look like to the plugin, where vLLM is not installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.plan.placement import Placement


class BaseRouter:
    """The seam: all that the plugin replaces."""

    top_k = 4
    global_num_experts = 16
    scoring_func = "softmax"
    renormalize = True
    eplb_state: Any = None

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

    custom_routing_function: Any = None


class Gemma4Router:
    """The module whose method is Gemma 4's routing function, with its factor on each expert."""

    def __init__(self) -> None:
        self.per_expert_scale = torch.linspace(0.5, 2.0, 16)

    def routing_function(self) -> None:
        """Of no use here: the hook computes what it would."""


def gemma4_router() -> CustomRoutingRouter:
    """vLLM's router of one of Gemma 4's layers."""
    router = CustomRoutingRouter()
    router.custom_routing_function = Gemma4Router().routing_function
    return router


@dataclass
class Context:
    """A forward context of an older vLLM."""

    slot_mapping: Any = field(default_factory=dict)
    dp_metadata: Any = None
    additional_kwargs: dict[str, Any] = field(default_factory=dict)
    no_compile_layers: dict[str, Any] = field(default_factory=dict)


def install_context(monkeypatch: pytest.MonkeyPatch, context: Any) -> None:
    """Makes `vllm.forward_context` hand out `context`; None for no step."""
    module = ModuleType("vllm.forward_context")
    module.get_forward_context = lambda: context  # type: ignore[attr-defined]
    module.is_forward_context_available = lambda: context is not None  # type: ignore[attr-defined]
    vllm = ModuleType("vllm")
    vllm.__version__ = "0.32.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)


def install_runner(
    monkeypatch: pytest.MonkeyPatch,
    has_field: bool = True,
    v1_fills: bool = True,
    v2_fills: bool = True,
) -> None:
    """Makes what vLLM's runners do about padding importable: the newest do all of it."""
    context = sys.modules["vllm.forward_context"]
    fields = {"is_padding": None} if has_field else {}
    context.ForwardContext = type("ForwardContext", (), fields)  # type: ignore[attr-defined]
    methods = dict.fromkeys(
        ("execute_model", "capture_model", "profile_run"), lambda *_, **__: None
    )
    filling = {"_prepare_padding_mask": None} if v1_fills else {}
    for name, members in (("gpu_model_runner", filling), ("gpu.model_runner", {})):
        module = ModuleType(f"vllm.v1.worker.{name}")
        module.GPUModelRunner = type("GPUModelRunner", (), {**methods, **members})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    environment = ModuleType("vllm.envs")
    environment.VLLM_MOE_SKIP_PADDING = v2_fills  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.envs", environment)


def ranks(*tokens: int) -> SimpleNamespace:
    """What vLLM knows of data-parallel ranks in a step."""
    return SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor(tokens))


def loaded_runner(
    experts: str = "TritonExperts", activation: str = "silu", **settings: Any
) -> SimpleNamespace:
    """A MoE layer that vLLM has loaded on one GPU, unquantised where `settings` say no other."""
    module = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
    loaded = type(experts, (), {"__module__": module, "apply": None})()
    names = (
        "quant_dtype", "w1_scale", "gemm1_clamp_limit", "w1_bias", "w2_bias", "a2_scale",
        "block_shape", "w2_scale",
    )  # fmt: skip
    loaded.quant_config = SimpleNamespace(
        **{name: settings.get(name) for name in names},
        use_int8_w8a16=settings.get("use_int8_w8a16", False),
        use_int4_w4a16=settings.get("use_int4_w4a16", False),
        per_act_token_quant=settings.get("per_act_token_quant", False),
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
            w13_weight=torch.zeros(1),
        ),
        moe_config=SimpleNamespace(
            is_lora_enabled=settings.get("is_lora_enabled", False),
            dp_size=settings.get("dp_size", 1),
            pcp_size=settings.get("pcp_size", 1),
            is_sequence_parallel=settings.get("is_sequence_parallel", False),
            moe_parallel_config=SimpleNamespace(
                all2all_backend=settings.get("all2all_backend", "allgather_reducescatter")
            ),
        ),
    )


def spread(ranks: int, rank: int = 0, strategy: str = "linear", data: int = 1, **more: Any) -> Any:
    """A layer of vLLM whose 16 experts are on so many ranks, held as vLLM would."""
    placed: Any = {"linear": Placement.linear, "round_robin": Placement.round_robin}
    held = placed[more.pop("held", strategy)](16, ranks).experts_on(rank)
    local_of_E = torch.tensor([held.index(e) if e in held else -1 for e in range(16)])
    parallel = SimpleNamespace(
        use_ep=ranks > 1, ep_size=ranks, ep_rank=rank, dp_size=data, is_sequence_parallel=False,
        enable_eplb=more.get("eplb", False),
    )  # fmt: skip
    parallel.moe_parallel_config = parallel
    return SimpleNamespace(
        moe_config=parallel,
        layer_name="layer 1",
        router=FusedTopKRouter(),
        expert_map_manager=SimpleNamespace(placement_strategy=strategy, expert_map=local_of_E),
    )


MODEL_CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 16, "intermediate_size": 32, "num_experts": 16,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "vocab_size": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


class VllmConfig:
    """vLLM's config of a model of two MoE layers on one GPU."""

    def __init__(self, model: dict[str, Any] = MODEL_CONFIG) -> None:
        self.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: model),
            hf_text_config=SimpleNamespace(num_hidden_layers=2),
        )
        self.use_v2_model_runner = False
        self.parallel_config = SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False)
        self.scheduler_config = SimpleNamespace(max_num_batched_tokens=8192)
        self.device_config = SimpleNamespace(device="cpu")
        self.compilation_config: Any = None
        self.speculative_config: Any = None
        self.cache_config: Any = None
        self.additional_config: dict[str, Any] = {}


def built_layer(index: int) -> Any:
    """A MoE layer of such a model, built and loaded, whose experts are not Triton's."""
    runner = spread(1)
    runner.layer_name = f"model.layers.{index}.mlp.experts"
    runner.moe_config.all2all_backend = "naive"
    runner.moe_config.pcp_size = 1
    runner.routed_experts = loaded_runner("OtherExperts").routed_experts
    runner.routed_experts.quant_method.is_monolithic = False
    return runner


def install_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes vLLM's modules of pipeline stages, forward context and runners importable."""
    install_context(monkeypatch, None)
    install_runner(monkeypatch)
    distributed, utils = ModuleType("vllm.distributed"), ModuleType("vllm.distributed.utils")
    distributed.get_pp_group = lambda: None  # type: ignore[attr-defined]
    utils.get_pp_indices = lambda *_: (0, 2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setitem(sys.modules, "vllm.distributed.utils", utils)
