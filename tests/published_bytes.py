"""Checkpoints as they are published: the bytes that each takes, and where that figure stands.

A figure is one of three. `total_size` of the checkpoint's model.safetensors.index.json; the sizes
of its files on the hub; or the hub's count of elements ("safetensors": by dtype, scales included),
times the bytes of each. Configs that `published.py` has not got are added here. Figures were looked
up in public copies of these pages; a checkpoint whose bytes were not to be had has none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from leanmoe.models.shape import MoEShape
from tests.published import BOTH, EMBEDDING, MODELS, Published, packed

INDEX = "total_size of its model.safetensors.index.json"
FILES = "sizes of its shards on the hub"
COUNT = "the hub's count of elements, two bytes each"
BLOCKS = (
    "the hub's count of elements: those that the same model has not got in bf16 are scales, "
    "one for 128 by 128 weights of a byte"
)


class Stored(NamedTuple):
    """Bytes of a checkpoint's tensors."""

    size: int
    source: str
    copies: int | None = None
    """Tables beside a layer that predicts ahead; None where the checkpoint has no such layer."""
    beside: int = 0
    """Bytes of what else stands beside the decoder, and is no part of what leanmoe counts."""


def predicts_ahead(shape: MoEShape, copies: int) -> float:
    """Bytes of a layer that predicts a further token: a decoder layer, a projection and norms.

    `copies` counts its own tables of embeddings and its head (DeepSeek-V3 report, section 2.2).
    """
    parts, stored, moe = shape.parameters, shape.storage, shape.routed_layers
    layer = parts.mixers / shape.layers * stored.mixer_bytes
    layer += parts.routers / moe * stored.router_bytes + parts.shared / moe * stored.shared_bytes
    joined = (2 * shape.hidden + 5) * shape.hidden * stored.plain_bytes
    tables = copies * parts.embedding * stored.embedding_bytes
    return layer + shape.weighted_experts * shape.expert_bytes + joined + tables


def _of(name: str, **changes: Any) -> Mapping[str, Any]:
    return {**MODELS[name].config, **changes}


def _blocks(count: int, plain: int, scale: int) -> int:
    """Bytes of a checkpoint in FP8 of `count` elements, of which `plain` are no scales."""
    scales = count - plain
    quantised = scales * 128**2
    return quantised + scales * scale + 2 * (plain - quantised)


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
_QWEN_FP8 = {
    **_FP8,
    "modules_to_not_convert": ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(94))],
}
_INT4 = packed("int", "pack-quantized")
_R1_NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "exclude_modules": ["lm_head", "*self_attn*", "model.layers.61*"],
}
_K2 = "moonshotai/Kimi-K2-Instruct"
_V3, _QWEN3 = "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B"
_CODER = _of(
    _QWEN3, hidden_size=6144, moe_intermediate_size=2560, num_hidden_layers=62,
    num_attention_heads=96, num_key_value_heads=8, num_experts=160,
)  # fmt: skip
_GRANITE: dict[str, Any] = {
    "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "vocab_size": 49155,
    "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32,
    "num_experts_per_tok": 8, "tie_word_embeddings": True,
}  # fmt: skip
_LING: dict[str, Any] = {
    "model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"],
    "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120,
    "moe_intermediate_size": 512, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
    "use_qk_norm": True, "use_qkv_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
_NEXT = "Qwen/Qwen3-Next-80B-A3B-Instruct"

CHECKPOINTS: Mapping[str, Published] = {
    **MODELS,
    "deepseek-ai/DeepSeek-V3.2-Exp": Published(
        _of(_V3, model_type="deepseek_v32", index_n_heads=64, index_head_dim=128),
        "671",
        "37",
        "model card: as V3.1-Terminus, with an indexer",
        EMBEDDING,
    ),
    "nvidia/DeepSeek-R1-NVFP4": Published(
        _of(_V3, quantization_config=_R1_NVFP4), "671", "37", "arXiv 2501.12948", EMBEDDING
    ),
    "moonshotai/Kimi-K2-Thinking": Published(
        _of(_K2, quantization_config=_INT4),
        "1040",
        "32.6",
        "arXiv 2507.20534, table 2",
        tolerance=0.014,
        note="As of Kimi-K2: 1.04 T is stated; its own config comes to 1,026.4 B.",
    ),
    "moonshotai/Kimi-K2.5": Published(
        {
            "model_type": "kimi_k25",
            "architectures": ["KimiK25ForConditionalGeneration"],
            "text_config": {**MODELS[_K2].config, "quantization_config": _INT4},
        },
        "1040",
        "32.6",
        "arXiv 2507.20534, table 2: the language model's",
        tolerance=0.014,
        note="As of Kimi-K2: 1.04 T is stated; its own config comes to 1,026.4 B.",
    ),
    "moonshotai/Moonlight-16B-A3B": Published(
        {
            "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840, "hidden_size": 2048,
            "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
            "num_attention_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 2.446, "tie_word_embeddings": False,
        },
        "16",
        "2.24",
        "arXiv 2502.16982, table 5: without embedding and head",
        BOTH,
    ),
    "Qwen/Qwen3-30B-A3B-FP8": Published(
        _of(_QWEN3, quantization_config=_QWEN_FP8),
        "30.5",
        "3.3",
        "model card",
        tolerance=0.017,
        note="3.35 by its own config: 3.3 has its digits cut off.",
    ),
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": Published(
        _of("Qwen/Qwen3-235B-A22B", quantization_config=_QWEN_FP8), "235", "22", "model card"
    ),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": Published(_CODER, "480", "35", "model card"),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8": Published(
        {**_CODER, "quantization_config": _QWEN_FP8}, "480", "35", "model card"
    ),
    "Qwen/Qwen3-Coder-Next": Published(MODELS[_NEXT].config, "80", None, "model card"),
    "Qwen/Qwen3-Coder-Next-FP8": Published(
        _of(_NEXT, quantization_config=_QWEN_FP8), "80", None, "model card"
    ),
    "Qwen/Qwen2-57B-A14B": Published(
        _of(
            "Qwen/Qwen1.5-MoE-A2.7B", hidden_size=3584, intermediate_size=18944,
            moe_intermediate_size=2560, shared_expert_intermediate_size=20480,
            num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, num_experts=64,
            num_experts_per_tok=8,
        ),
        "57",
        "14",
        "arXiv 2407.10671, table 1",
    ),
    "mistralai/Mixtral-8x22B-v0.1": Published(
        _of(
            "mistralai/Mixtral-8x7B-v0.1", hidden_size=6144, intermediate_size=16384,
            num_hidden_layers=56, num_attention_heads=48,
        ),
        "141",
        "39",
        "mistral.ai, Cheaper, better, faster, stronger",
    ),
    "openai/gpt-oss-20b": Published(
        _of("openai/gpt-oss-120b", num_hidden_layers=24, num_local_experts=32),
        "20.91",
        "3.61",
        "arXiv 2508.10925, table 1",
        EMBEDDING,
    ),
    "zai-org/GLM-4.5-Air": Published(
        _of(
            "zai-org/GLM-4.5", hidden_size=4096, intermediate_size=10944,
            moe_intermediate_size=1408, num_hidden_layers=46, n_routed_experts=128,
            first_k_dense_replace=1, routed_scaling_factor=1.0, use_qk_norm=False,
        ),
        "106",
        "12",
        "arXiv 2508.06471, table 1",
        BOTH,
    ),
    "ibm-granite/granite-3.1-1b-a400m": Published(
        _GRANITE, "1.3", "0.4", "model card", EMBEDDING
    ),
    "ibm-granite/granite-3.2-3b-a800m": Published(
        {**_GRANITE, "hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 24,
         "num_local_experts": 40},
        "3.3", "0.8", "model card", EMBEDDING,
    ),
    "ai21labs/Jamba-v0.1": Published(
        {
            "model_type": "jamba", "architectures": ["JambaForCausalLM"], "vocab_size": 65536,
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_experts": 16,
            "num_experts_per_tok": 2, "attn_layer_period": 8, "attn_layer_offset": 4,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256,
            "tie_word_embeddings": False,
        },
        "52",
        "12",
        "arXiv 2403.19887, section 1",
    ),
    "LiquidAI/LFM2-8B-A1B": Published(
        {
            "model_type": "lfm2_moe", "architectures": ["Lfm2MoeForCausalLM"], "vocab_size": 65536,
            "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792,
            "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_experts": 32, "num_experts_per_tok": 4, "num_dense_layers": 2,
            "use_expert_bias": True, "conv_L_cache": 3,
            "layer_types": [
                "full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)
            ],
        },
        "8.3",
        "1.5",
        "model card",
        tolerance=0.04,
        note="1.56 active by its own config: 1.5 has its digits cut off.",
    ),
    "tencent/Hy3": Published(
        {
            "model_type": "hy_v3", "architectures": ["HYV3ForCausalLM"], "vocab_size": 120832,
            "hidden_size": 4096, "intermediate_size": 13312, "moe_intermediate_size": 1536,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 128, "num_experts": 192, "num_experts_per_tok": 8,
            "num_shared_experts": 1, "tie_word_embeddings": False,
        },
        "295",
        "21",
        "model card; sizes as Transformers' HYV3Config has them for it",
    ),
    "inclusionAI/Ling-mini-2.0": Published(_LING, "16", "1.4", "model card", tolerance=0.03,
        note="1.43 active by its own config."),
    "inclusionAI/Ling-flash-2.0": Published(
        {**_LING, "hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024,
         "num_hidden_layers": 32, "num_attention_heads": 32},
        "103", "6.1", "model card",
    ),
    "deepseek-ai/deepseek-moe-16b-base": Published(
        {
            "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"],
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1, "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
        "16.4", "2.8", "arXiv 2401.06066, table 3",
        tolerance=0.011, note="2.83 active by its own config.",
    ),
    "ibm-granite/granite-4.0-h-small": Published(
        {
            "model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"],
            "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 768,
            "shared_intermediate_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 72, "num_experts_per_tok": 10,
            "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_head": 64, "mamba_d_state": 128,
            "mamba_d_conv": 4, "mamba_expand": 2, "tie_word_embeddings": True,
            "layer_types": [
                "attention" if n in (5, 15, 25, 35) else "mamba" for n in range(40)
            ],
        },
        "32", "9", "model card",
    ),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B": Published(
        {
            "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"],
            "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 5376,
            "moe_intermediate_size": 2688, "moe_latent_size": 1024,
            "moe_shared_expert_intermediate_size": 5376, "num_hidden_layers": 88,
            "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
            "EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
            "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128,
            "conv_kernel": 4, "use_conv_bias": True, "n_routed_experts": 512,
            "num_experts_per_tok": 22, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 5.0, "tie_word_embeddings": False,
        },
        "120", "12", "its name", tolerance=0.07,
        note="120.7 and 12.8 by its own config: the name is rounded.",
    ),
    "poolside/Laguna-XS-2.1": Published(
        {
            "model_type": "laguna", "architectures": ["LagunaForCausalLM"], "vocab_size": 100352,
            "hidden_size": 2048, "intermediate_size": 8192, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "num_hidden_layers": 40,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
            "num_experts": 256, "num_experts_per_tok": 8, "sliding_window": 512,
            "mlp_layer_types": ["dense", *["sparse"] * 39], "gating": "per-head",
            "layer_types": ["full_attention", *["sliding_attention"] * 3] * 10,
            "num_attention_heads_per_layer": [48, 64, 64, 64] * 10, "tie_word_embeddings": False,
        },
        "33",
        "3",
        "model card",
    ),
}  # fmt: skip

_STEP_AHEAD = 4096 * 96 * 128 * 2 + 2 * 4096 * 8 * 128 + 4096 * 96 + 2 * 128  # attention
_STEP_AHEAD += 3 * 4096 * 11264 + 2 * 4096**2 + 5 * 4096 + 4096 * 128896  # dense, and a head

_SUPER_AHEAD = 4096 * (2 * 4096 + 2 * 256) + 2 * 4096**2  # attention and what joins
_SUPER_AHEAD += 512 * (2 * 1024 * 2688 + 4096) + 2 * 4096 * (5376 + 1024)  # experts

STORED: Mapping[str, Stored] = {
    "deepseek-ai/DeepSeek-V3": Stored(688586727753, FILES, 2),
    "deepseek-ai/DeepSeek-V3.2-Exp": Stored(_blocks(685396921376, 685355329792, 4), BLOCKS, 2),
    "deepseek-ai/DeepSeek-V2": Stored(471486512925, FILES),
    "deepseek-ai/DeepSeek-V2-Lite": Stored(31412968448, INDEX),
    "nvidia/DeepSeek-R1-NVFP4": Stored(
        657652187136 * 9 // 16 + 2 * (684489845504 - 657652187136),
        "the hub's count of 396,767,013,632 elements: of 684,489,845,504 weights 657,652,187,136 "
        "are two to a byte, with a scale of a byte for 16",
        beside=2 * 13463426304,
    ),
    "deepseek-ai/DeepSeek-V4-Flash": Stored(
        round(148.66 * 2**30), "vLLM's log, 148.66 GiB (vllm-project/vllm issue 40778)", 0
    ),
    "moonshotai/Kimi-K2-Instruct": Stored(1029173256720, "headers of its 61 shards"),
    "moonshotai/Kimi-K2-Thinking": Stored(594205920512, "headers of its 62 shards"),
    "moonshotai/Kimi-K2.5": Stored(595148192736, "headers of its 64 shards, vision included"),
    "moonshotai/Kimi-K3": Stored(1560860324864, "headers of its 96 shards, vision included"),
    "moonshotai/Moonlight-16B-A3B": Stored(2 * 15960111936, COUNT),
    "Qwen/Qwen3-30B-A3B": Stored(61064245248, INDEX),
    "Qwen/Qwen3-30B-A3B-FP8": Stored(
        29896998912 + 2 * 636948480, "the hub's count of elements by dtype: F8_E4M3 and BF16"
    ),
    "Qwen/Qwen3-235B-A22B": Stored(470187269120, INDEX),
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": Stored(
        _blocks(235107904512, 235093634560, 2), BLOCKS
    ),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": Stored(960313541352, FILES),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8": Stored(
        _blocks(480184064000, 480154875392, 2), BLOCKS
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Stored(2 * 81324862720, COUNT, 0),
    "Qwen/Qwen3-Coder-Next": Stored(2 * 79674391296, COUNT),
    "Qwen/Qwen3-Coder-Next-FP8": Stored(_blocks(79679212800, 79674391296, 2), BLOCKS),
    "Qwen/Qwen1.5-MoE-A2.7B": Stored(28631568384, INDEX),
    "Qwen/Qwen2-57B-A14B": Stored(2 * 57408658944, COUNT),
    "Qwen/Qwen3.5-35B-A3B": Stored(
        71903645408, f"{INDEX}; beside the decoder vision and a layer ahead", beside=2582424032
    ),
    "Qwen/Qwen3.5-397B-A17B": Stored(
        806795875168, "headers of its shards, by part", beside=912020960 + 13191136256
    ),
    "mistralai/Mixtral-8x7B-v0.1": Stored(93405713504, FILES),
    "mistralai/Mixtral-8x22B-v0.1": Stored(281241493344, FILES),
    "allenai/OLMoE-1B-7B-0924": Stored(13838323712, "bytes of all its tensors"),
    "openai/gpt-oss-20b": Stored(13761264768, INDEX),
    "openai/gpt-oss-120b": Stored(65248815744, "bytes of all its tensors"),
    "zai-org/GLM-4.5": Stored(2 * 358337791296, COUNT, 2),
    "zai-org/GLM-4.5-Air": Stored(2 * 110468824832, COUNT, 2),
    "zai-org/GLM-5": Stored(2 * 753864139008, COUNT, 0),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B": Stored(2 * 31577937344, COUNT),
    "MiniMaxAI/MiniMax-M2": Stored(
        _blocks(228703644928, 228689764864, 4), f"{BLOCKS}; those of M2.5, the same in size"
    ),
    "MiniMaxAI/MiniMax-Text-01": Stored(
        2 * 456089655296, f"{COUNT}; that of MiniMax-M1, the same in size"
    ),
    "stepfun-ai/Step-3.5-Flash": Stored(2 * 199384301376, COUNT, beside=6 * _STEP_AHEAD),
    "meituan-longcat/LongCat-Flash-Chat": Stored(2 * 561862880256, COUNT),
    "tencent/Hy3": Stored(2 * 298786155776, COUNT, 0),
    "ibm-granite/granite-3.1-1b-a400m": Stored(2 * 1334628352, COUNT),
    "ibm-granite/granite-3.2-3b-a800m": Stored(2 * 3298793472, COUNT),
    "ai21labs/Jamba-v0.1": Stored(103140646656, INDEX),
    "LiquidAI/LFM2-8B-A1B": Stored(
        2 * 8339929856 + 4 * 704, "the hub's count of elements by dtype: BF16 and F32"
    ),
    "inclusionAI/Ling-mini-2.0": Stored(2 * 16255643392, COUNT),
    "inclusionAI/Ling-flash-2.0": Stored(2 * 102889705216, COUNT),
    "deepseek-ai/deepseek-moe-16b-base": Stored(2 * 16375728128, COUNT),
    "ibm-granite/granite-4.0-h-small": Stored(2 * 32207337984, COUNT),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B": Stored(
        2 * 123611012096, COUNT, beside=2 * _SUPER_AHEAD
    ),
    "poolside/Laguna-XS-2.1": Stored(2 * 33442617088, COUNT),
}
