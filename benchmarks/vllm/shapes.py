"""Shapes of models that are measured with dummy weights: what their config.json says."""

from __future__ import annotations

from typing import Any

QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048,
    "intermediate_size": 18432, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "vocab_size": 129280, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "moe_layer_freq": 1,
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
    "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 2880, "num_local_experts": 128, "num_experts_per_tok": 4,
    "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18, "rope_theta": 150000.0,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "swiglu_limit": 7.0, "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096, "truncate": False,
    },
}  # fmt: skip
FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip
TINY = QWEN | {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "moe_intermediate_size": 64, "intermediate_size": 128, "num_experts": 64,
    "num_experts_per_tok": 8, "vocab_size": 512,
}  # fmt: skip
TINY_GPT_OSS = GPT_OSS | {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 64, "num_local_experts": 64, "vocab_size": 512,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
SHAPES = {
    "qwen3-30b-a3b": QWEN, "deepseek-v3": DEEPSEEK, "gpt-oss-120b": GPT_OSS, "tiny": TINY,
    "tiny-gpt-oss": TINY_GPT_OSS,
}  # fmt: skip
"""Published shapes, in bfloat16; --layers takes as many layers as fit the GPUs. The tiny ones are
no models: they run on a CPU."""
MLA = ("deepseek-v3",)
"""Shapes whose attention is left to vLLM."""
PUBLISHED_LAYERS = {"qwen3-30b-a3b": 48, "deepseek-v3": 61, "gpt-oss-120b": 36}


def config_of(shape: str, layers: int | None, is_fp8: bool = False) -> dict[str, Any]:
    """The config.json of a shape, with another number of layers if any is named."""
    config: dict[str, Any] = dict(SHAPES[shape])
    if layers:
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    if is_fp8:
        config["quantization_config"] = FP8
    return config


def what_it_is(shape: str, layers: int, is_fp8: bool = False) -> str:
    """What a reader of the results must know of them, in one line."""
    if shape not in PUBLISHED_LAYERS:
        return f"{shape}: no model, to try the script out"
    found = f"the shape of {shape}, drawn weights, {layers} of {PUBLISHED_LAYERS[shape]} layers"
    if shape == "gpt-oss-120b":
        found += ", experts in bfloat16 (published in MXFP4, a quarter of the bytes)"
    return f"{found}, weights in blocks of fp8" if is_fp8 else found
