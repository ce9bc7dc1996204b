"""Published models: what of each config.json says its shape, and the sizes its makers state.

The numbers are from each model's public config.json and its own card or report; parameters in
billions, as stated there. Configs of the study's models are those that the study reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from leanmoe.models.catalog import CONFIGS


class Published(NamedTuple):
    """A model's config and its stated parameters, total and active."""

    config: Mapping[str, Any]
    total: float
    active: float | None
    """None where it is stated too roughly to tell anything."""
    counts_embedding: bool = True
    """Whether the makers' active parameters count the embedding table."""


_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
}

MODELS: dict[str, Published] = {
    "deepseek-ai/DeepSeek-V3": Published(
        CONFIGS["deepseek-ai/DeepSeek-V3"],
        671,
        37,
        counts_embedding=False,
    ),
    "deepseek-ai/DeepSeek-V2": Published(
        {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            **_LATENT,
            "vocab_size": 102400,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
        },
        236,
        21,
        counts_embedding=False,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": Published(
        CONFIGS["deepseek-ai/DeepSeek-V2-Lite"],
        15.7,
        2.4,
        counts_embedding=False,
    ),
    "moonshotai/Kimi-K2-Instruct": Published(
        CONFIGS["moonshotai/Kimi-K2-Instruct"],
        1040,
        32.6,
    ),
    "Qwen/Qwen3-30B-A3B": Published(
        CONFIGS["Qwen/Qwen3-30B-A3B"],
        30.5,
        3.3,
    ),
    "Qwen/Qwen3-235B-A22B": Published(
        CONFIGS["Qwen/Qwen3-235B-A22B"],
        235,
        22,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Published(
        {
            "model_type": "qwen3_next",
            "architectures": ["Qwen3NextForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "full_attention_interval": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        80,
        None,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": Published(
        {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
        14.3,
        2.7,
    ),
    "mistralai/Mixtral-8x7B-v0.1": Published(
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
        46.7,
        12.9,
    ),
    "allenai/OLMoE-1B-7B-0924": Published(
        {
            "model_type": "olmoe",
            "architectures": ["OlmoeForCausalLM"],
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
        6.9,
        1.3,
    ),
    "openai/gpt-oss-120b": Published(
        CONFIGS["openai/gpt-oss-120b"],
        116.83,
        5.13,
        counts_embedding=False,
    ),
    "zai-org/GLM-4.5": Published(
        {
            "model_type": "glm4_moe",
            "architectures": ["Glm4MoeForCausalLM"],
            "vocab_size": 151552,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 92,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 160,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "tie_word_embeddings": False,
        },
        355,
        32,
        counts_embedding=False,
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B": Published(
        {
            "model_type": "nemotron_h",
            "architectures": ["NemotronHForCausalLM"],
            "vocab_size": 131072,
            "hidden_size": 2688,
            "intermediate_size": 1856,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "num_hidden_layers": 52,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "conv_kernel": 4,
            "use_conv_bias": True,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "tie_word_embeddings": False,
        },
        31.6,
        3.6,
    ),
}
