"""The table of model families: how each routes, and what its layers hold, written down once.

Only what truly differs per family stands here; the sizes come from config.json (`shape.py`).
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from leanmoe.core.errors import LeanMoeError, shown, unknown_name
from leanmoe.models.attention import (
    attention,
    attention_residuals,
    compressed_attention,
    hybrid,
    hyper_connections,
    indexer,
    latent_attention,
    per_layer_embeddings,
    plus,
    sinks,
    stream_head,
    two_widths,
    window_and_full,
)
from leanmoe.models.family import REFUSED, Family
from leanmoe.models.linear_attention import (
    gated_delta_net,
    kimi_delta,
    lightning_attention,
    mamba,
    mamba2,
    short_convolution,
)
from leanmoe.models.routers import (
    BIAS,
    DEEPSEEK_V3,
    GEMMA4,
    SIGMOID,
    SIGMOID_NORMALISED,
    SOFTMAX,
    SOFTMAX_AFTER_TOP_K,
    SOFTMAX_NORMALISED,
    SQRT_SOFTPLUS,
    GroupScore,
    Router,
    ScoreDtype,
    Scoring,
    bailing,
    cohere,
    deepseek_v2,
    lfm2,
    longcat,
    routing,
)

__all__ = ["FAMILIES", "Family", "GroupScore", "Router", "ScoreDtype", "Scoring", "family_of"]


def family_of(model_type: object) -> Family:
    """The family of a `model_type`.

    Raises LeanMoeError for one that cannot be run, with the reason, and for an unknown one, naming
    near ones.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in REFUSED:
        raise LeanMoeError(f"no plan can run on {model_type}: {REFUSED[model_type]}")
    if model_type is None:
        raise LeanMoeError("config.json has no model_type: it is not a model's config")
    if not isinstance(model_type, str):
        raise LeanMoeError(f"config.json: model_type is {shown(model_type)}: it must be a word")
    raise unknown_name("mixture-of-experts model_type", model_type, sorted(FAMILIES))


def _defaults(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


_V3 = Family(
    DEEPSEEK_V3,
    latent_attention(),
    defaults=_defaults(
        first_k_dense_replace=3,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        n_shared_experts=1,
    ),
)
_ONE_GROUP = _defaults(**{**_V3.defaults, "n_group": 1, "topk_group": 1})
_MHC = hyper_connections(lambda streams: (2 + streams) * streams, 3)
_LINEAR = {"linear_conv_kernel_dim": 4, "full_attention_interval": 4}
_GLM = replace(
    _V3,
    mixer=attention(norm="head", norm_flag="use_qk_norm"),
    defaults=_defaults(first_k_dense_replace=1, norm_topk_prob=True, n_shared_experts=1),
)
_QWEN2 = Family(
    SOFTMAX,
    attention(bias="qkv_bias"),
    shared_width="shared_expert_intermediate_size",
    shared_gate=True,
    defaults=_defaults(qkv_bias=True),
)
_QWEN3 = Family(SOFTMAX, attention(norm="head", output_bias=True))
_QWEN3_NEXT = replace(
    _QWEN2,
    mixer=hybrid(attention(norm="head", gate="element"), gated_delta_net),
    defaults=_defaults(norm_topk_prob=True, **_LINEAR),
)
_QWEN3_5 = replace(_QWEN3_NEXT, router=SOFTMAX_NORMALISED)
_MIXTRAL = Family(SOFTMAX_NORMALISED, attention(bias=False), width="intermediate_size")
_GRANITE = Family(SOFTMAX_AFTER_TOP_K, attention(output_bias=True), width="intermediate_size")
_GRANITE_SHARED = replace(_GRANITE, shared_width="shared_intermediate_size")
_M3 = replace(
    _MIXTRAL,
    router=routing(replace(SIGMOID_NORMALISED, sorted_top_k=False)),
    mixer=attention(bias=False, norm="head"),
    dense_width="dense_intermediate_size",
    shared_width="shared_intermediate_size",
)

_OLMOE = Family(SOFTMAX, attention(norm="full", output_bias=True), width="intermediate_size")
_MINIMAX = replace(
    _MIXTRAL,
    mixer=hybrid(attention(bias=False), lightning_attention),
    defaults=_defaults(attn_layer_period=2),
)

FAMILIES: Mapping[str, Family] = {
    "deepseek": Family(SOFTMAX, attention()),
    "deepseek_v2": replace(_V3, router=deepseek_v2, defaults=_defaults(n_shared_experts=2)),
    "deepseek_v3": _V3,
    "deepseek_v32": replace(_V3, mixer=latent_attention(indexer)),
    "deepseek_v4": replace(
        _V3,
        router=routing(SQRT_SOFTPLUS, scaling="routed_scaling_factor"),
        mixer=plus(compressed_attention, _MHC),
        further=stream_head,
        defaults=_defaults(n_shared_experts=1, routed_scaling_factor=1.5, num_hash_layers=3),
    ),
    "kimi_k2": _V3,
    "axk1": replace(
        _V3, moe_norms=1, defaults=_defaults(**{**_V3.defaults, "first_k_dense_replace": 1})
    ),
    "glm4_moe": _GLM,
    "glm4v_moe_text": replace(
        _GLM, mixer=attention(), defaults=_defaults(**{**_GLM.defaults, "attention_bias": True})
    ),
    "glm4_moe_lite": replace(
        _GLM,
        mixer=latent_attention(),
        defaults=_defaults(**{**_GLM.defaults, "routed_scaling_factor": 1.8}),
    ),
    "glm_moe_dsa": replace(_GLM, mixer=latent_attention(indexer), defaults=_ONE_GROUP),
    "glm5_next_text": replace(
        _V3,
        mixer=plus(hybrid(latent_attention(indexer), kimi_delta()), _MHC),
        defaults=_defaults(**_ONE_GROUP, index_kpool=16, full_attention_interval=4),
    ),
    "hy_v4": replace(
        _V3,
        mixer=plus(
            latent_attention(indexer, "element"), sinks, hyper_connections(lambda n: 2 * n, 2)
        ),
        further=stream_head,
        defaults=_defaults(
            **{**_ONE_GROUP, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
            index_topk_freq=4,
        ),
    ),
    "longcat_flash": Family(
        longcat,
        latent_attention(),
        width="expert_ffn_hidden_size",
        shared_width="ffn_hidden_size",
        sublayers=2,
        ignores=("num_hidden_layers",),  # 5.17 has 56 there, whatever num_layers is
        defaults=_defaults(zero_expert_num=256, routed_scaling_factor=6.0),
    ),
    "solar_open": replace(
        _GLM, mixer=attention(), defaults=_defaults(norm_topk_prob=True, n_shared_experts=1)
    ),
    "sarvam_moe": replace(
        _GLM,
        defaults=_defaults(**{**_GLM.defaults, "routed_scaling_factor": 2.5}, use_qk_norm=True),
    ),
    "sarvam_mla": replace(_V3, defaults=_defaults(**{**_ONE_GROUP, "first_k_dense_replace": 1})),
    "dots1": replace(_GLM, mixer=attention(norm="head", output_bias=True), defaults=_defaults()),
    "exaone_moe": replace(
        _GLM,
        mixer=attention(bias=False, norm="head"),
        defaults=_defaults(
            **{**_GLM.defaults, "routed_scaling_factor": 2.5}, sliding_window_pattern=4
        ),
    ),
    "mimo_v2_flash": replace(
        _GLM,
        mixer=window_and_full,
        defaults=_defaults(first_k_dense_replace=1, norm_topk_prob=True),
    ),
    "mistral4": replace(
        _V3,
        router=routing(
            Router(normalise_epsilon=1e-20, sorted_top_k=False, score_dtype="logits"),
            "norm_topk_prob",
            "routed_scaling_factor",
            groups=True,
        ),
        defaults=_defaults(norm_topk_prob=True, n_shared_experts=1),
    ),
    "kimi_linear": replace(
        _V3,
        mixer=plus(hybrid(latent_attention(), kimi_delta()), attention_residuals),
        further=lambda settings: attention_residuals(settings, 0) // 2,
        defaults=_defaults(**{**_GLM.defaults, "routed_scaling_factor": 2.446}),
    ),
    "bailing_moe": Family(
        bailing,
        attention(bias="use_qkv_bias", norm="head", norm_flag="use_qk_norm"),
        defaults=_defaults(norm_topk_prob=True, use_qk_norm=True),
    ),
    "bailing_hybrid": replace(
        _V3,
        mixer=hybrid(latent_attention(gate="head"), kimi_delta(low_rank=False)),
        defaults=_defaults(
            **{**_V3.defaults, "first_k_dense_replace": 2, "full_attention_interval": 6}
        ),
    ),
    "beam": Family(
        routing(replace(SIGMOID, sorted_top_k=True), "norm_topk_prob", groups=True),
        # A bias of its gates a head: as many weights as sinks.
        attention(norm="head", gate="element", sinks=True, output_bias=True),
        layer_norms=4,
        defaults=_defaults(first_k_dense_replace=3, norm_topk_prob=True, n_group=8, topk_group=4),
    ),
    "hy_v3": Family(
        routing(replace(SIGMOID, normalise=True), scaling="routed_scaling_factor"),
        attention(norm="head", output_bias=True),
        defaults=_defaults(
            first_k_dense_replace=1, n_shared_experts=1, routed_scaling_factor=2.826
        ),
    ),
    "afmoe": Family(
        routing(
            replace(SIGMOID, ranking_bias="expert_bias", normalise=True, sorted_top_k=True),
            scaling="routed_scaling_factor",
        ),
        attention(norm="head", gate="element", output_bias=True),
        layer_norms=4,
        defaults=_defaults(first_k_dense_replace=1, n_shared_experts=2, sliding_window_pattern=4),
    ),
    "laguna": Family(
        routing(SIGMOID_NORMALISED),
        attention(norm="head", gate="head", output_bias=True),
        shared_width="shared_expert_intermediate_size",
        defaults=_defaults(first_k_dense_replace=1),
    ),
    "flint": Family(
        routing(Router("sigmoid"), "norm_topk_prob"),
        attention(norm="head", sinks=True, output_bias=True),
        shared_width="shared_expert_intermediate_size",
        defaults=_defaults(norm_topk_prob=True, mlp_only_layers=[0, 1]),
    ),
    "lfm2_moe": Family(
        lfm2,
        hybrid(attention(bias=False, norm="head"), short_convolution),
        defaults=_defaults(
            first_k_dense_replace=2,
            norm_topk_prob=True,
            use_expert_bias=True,
            tie_word_embeddings=True,
            conv_L_cache=3,
        ),
    ),
    "nemotron_h": replace(
        _GLM,
        mixer=hybrid(attention(output_bias=True), mamba2),
        shared_width="moe_shared_expert_intermediate_size",
        matrices=2,
        layer_norms=1,
        single=True,
        defaults=_defaults(
            norm_topk_prob=True, n_shared_experts=1, n_groups=8, ssm_state_size=128, conv_kernel=4
        ),
    ),
    "qwen2_moe": _QWEN2,
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe_text": replace(
        _QWEN3, router=SOFTMAX_NORMALISED, defaults=_defaults(tie_word_embeddings=True)
    ),
    "qwen3_omni_moe_text": replace(_QWEN3, defaults=_defaults(norm_topk_prob=True)),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_5,
    "mellum": replace(_QWEN3, defaults=_defaults(norm_topk_prob=True)),
    "olmoe": _OLMOE,
    "flex_olmo": _OLMOE,
    "jamba": Family(
        routing(Router()),
        hybrid(attention(bias=False), mamba),
        width="intermediate_size",
        defaults=_defaults(
            attn_layer_period=8,
            attn_layer_offset=4,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_expand=2,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_dt_rank="auto",
        ),
    ),
    "hunyuan_v1_moe": Family(
        SOFTMAX_NORMALISED,
        attention(norm="head", output_bias=True),
        width="intermediate_size",
        shared_width="intermediate_size",
    ),
    "mixtral": _MIXTRAL,
    "minimax": _MINIMAX,
    "minimax_text_01": _MINIMAX,
    "minimax_m1": _MINIMAX,
    "minimax_m2": replace(
        _MIXTRAL,
        router=routing(replace(SIGMOID_NORMALISED, sorted_top_k=False)),
        mixer=attention(bias=False, norm="full"),
    ),
    "minimax_m3_vl_text": _M3,
    "gpt_oss": replace(
        _GRANITE,
        mixer=attention(output_bias=True, sinks=True),
        biases=True,
        defaults=_defaults(attention_bias=True),
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE_SHARED,
    "granitemoe_swa": replace(_GRANITE_SHARED, mixer=attention(output_bias=True, sinks=True)),
    "granitemoehybrid": replace(
        _GRANITE_SHARED,
        mixer=hybrid(attention(output_bias=True), mamba2),
        defaults=_defaults(
            shared_intermediate_size=1024,
            mamba_n_heads=128,
            mamba_expand=2,
            mamba_d_state=256,
            mamba_d_conv=4,
        ),
    ),
    "aria_text": Family(
        SOFTMAX_AFTER_TOP_K,
        attention(output_bias=True),
        width="intermediate_size",
        defaults=_defaults(n_shared_experts=2),
    ),
    "cohere2_moe": Family(
        cohere,
        attention(output_bias=True),
        width="intermediate_size",
        dense_width="prefix_dense_intermediate_size",
        layer_norms=1,
        defaults=_defaults(norm_topk_prob=True, tie_word_embeddings=True, sliding_window_pattern=4),
    ),
    "ernie4_5_moe": Family(
        routing(Router(ranking_bias=f"moe_statics.{BIAS}", normalise=True)),
        attention(bias="use_bias", output_bias=True),
        defaults=_defaults(first_k_dense_replace=1, n_shared_experts=2, tie_word_embeddings=True),
    ),
    "gemma4_text": Family(
        GEMMA4,
        two_widths,
        shared_width="intermediate_size",
        layer_norms=4,
        moe_norms=4,  # the fourth is the router's own factor on its input
        further=per_layer_embeddings,
        defaults=_defaults(
            tie_word_embeddings=True, global_head_dim=512, hidden_size_per_layer_input=256
        ),
    ),
    "step3p5": Family(
        routing(replace(SIGMOID_NORMALISED, sorted_top_k=False)),
        attention(bias=False, norm="head", gate="head"),
        shared_width="share_expert_dim",
        defaults=_defaults(first_k_dense_replace=3),
    ),
    "phimoe": Family(
        routing(Router()),
        attention(output_bias=True),
        width="intermediate_size",
        norm_biases=True,
        not_runnable="its router masks the best expert's rivals before it picks a second one",
    ),
}
"""By config.json's `model_type`."""
