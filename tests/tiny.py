"""A tiny randomly initialised model of any family in the table, as Transformers builds it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "moe_num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_k": 4,
    "moe_topk": 4,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
    "prefix_dense_intermediate_size": 40,
    "top_k_experts": 4,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "zero_expert_num": 4,
    "share_expert_dim": 24,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_topk": 8,
    "hc_mult": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
}
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_text": {"enable_moe_block": True},
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_topk": 16, "index_kpool": 2},
    "longcat_flash": {"num_layers": 3},
    "granitemoehybrid": {
        "layer_types": [
            "linear_attention",
            "linear_attention",
            "full_attention",
            "linear_attention",
        ]
    },
    "kimi_linear": {
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "num_hidden_layers": 5,
        "n_groups": 2,
    },
}
"""What Transformers has no usable default for."""
OF_FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"num_hidden_layers": 5, "num_key_value_heads": 1, "intermediate_size": None},
    "longcat_flash": {"intermediate_size": None, "num_hidden_layers": None},
    "step3p5": {
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
        "num_sliding_attention_heads": 8,
    },
    "axk1": {"head_dim": None},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {"head_dim": None},
    "dots1": {"n_shared_experts": 2, "norm_topk_prob": True},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "granitemoeshared": {"attention_bias": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "olmoe": {"norm_topk_prob": True},
    "qwen3_moe": {"norm_topk_prob": True, "attention_bias": True},
}
"""What else differs; None leaves the family's own default."""
OWN_CLASS = {
    "step3p5": ("transformers.models.step3p7.modeling_step3p7", "Step3p7TextModel"),
    "qwen3_omni_moe_text": (
        "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe",
        "Qwen3OmniMoeThinkerTextModel",
    ),
}
"""Language parts that Transformers' Auto classes do not build by themselves."""


def settings(family: str) -> dict[str, Any]:
    """Tiny values for those of `SIZES` that the family has, and what differs in it."""
    kind = _kind(family)
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    found = {name: value for name, value in SIZES.items() if name in known}
    found |= NEEDED.get(family, {}) | OF_FAMILY.get(family, {})
    return {name: value for name, value in found.items() if value is not None}


def config(family: str, **changes: Any) -> Any:
    """The family's config with tiny sizes."""
    return _kind(family)(**(settings(family) | changes))


def _kind(family: str) -> Any:
    """The family's class of configs; a test skips where this Transformers does not have it."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {family}")
    return CONFIG_MAPPING[family]


def build(
    family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any
) -> Any:
    """The model, with routers' weights and biases wide enough that their choices differ."""
    torch.manual_seed(0)
    with torch.device(device):
        model = _model(family, **changes)
    if device != "meta":
        generator = torch.Generator().manual_seed(1)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():  # DeepSeek-V4's table of experts by token id
                tensor.data = torch.randint(4, tensor.shape, generator=generator)
            elif any(mark in name for mark in ("gate.", "router.", "expert_bias", "e_score")):
                tensor.data = torch.randn(tensor.shape, generator=generator) * 0.5
    return model.to(dtype).eval()


def _model(family: str, **changes: Any) -> Any:
    if family in OWN_CLASS:
        module, name = OWN_CLASS[family]
        return getattr(import_module(module), name)(config(family, **changes))
    try:
        return AutoModelForCausalLM.from_config(config(family, **changes))
    except ValueError:  # the language part of a multimodal model: it has no head of its own
        return AutoModel.from_config(config(family, **changes))
