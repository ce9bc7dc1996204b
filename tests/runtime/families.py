"""A tiny randomly initialised model of each family."""

from __future__ import annotations

from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
QWEN: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "head_dim": 8,
}
LOCAL: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "DeepseekV2",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "head_dim": 8},
    ),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "norm_topk_prob": True}),
    "glm4_moe": (
        "Glm4Moe",
        {
            **QWEN,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **QWEN,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "olmoe": ("Olmoe", {**QWEN, "intermediate_size": 16}),
    "flex_olmo": ("FlexOlmo", {**QWEN, "intermediate_size": 16}),
    "mixtral": ("Mixtral", LOCAL),
    "minimax": ("MiniMax", {**LOCAL, "head_dim": 8}),
    "minimax_m2": ("MiniMaxM2", {**LOCAL, "head_dim": 8, "rotary_dim": 4}),
    "gpt_oss": ("GptOss", {**LOCAL, "head_dim": 8, "sliding_window": 16}),
    "granitemoe": ("GraniteMoe", LOCAL),
    "granitemoeshared": ("GraniteMoeShared", {**LOCAL, "shared_intermediate_size": 24}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            **{key: value for key, value in QWEN.items() if not key.startswith("num_experts")},
            "moe_num_experts": 8,
            "moe_k": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
}


WIDE = ("experts", "gate.weight", "router", "e_score_correction_bias")


def build(family: str, **changes: Any) -> Any:
    """The model, with the routers' weights wide enough that their choices differ."""
    name, settings = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(part in parameter_name for part in WIDE):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    return model


TOP_K_KEY = {"ernie4_5_moe": "moe_k"}
"""Families whose config names the experts a token gets otherwise than the rest."""
