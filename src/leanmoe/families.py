"""How each model family's router turns logits into experts and weights: written down once.

Only what truly differs per family stands here; the sizes come from config.json (`shape.py`).
Needs no torch. The table follows the router classes of Transformers 5.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from leanmoe.config import Settings
from leanmoe.errors import LeanMoeError
from leanmoe.mixers import (
    Mixer,
    attention,
    gated_delta_net,
    hybrid,
    kimi_delta,
    latent_attention,
    lightning_attention,
    mamba,
    mamba2,
    short_convolution,
    window_and_full,
)

Scoring = Literal["softmax", "sigmoid", "softmax_after_top_k"]
GroupScore = Literal["max", "top2_sum"]
ScoreDtype = Literal["float32", "logits"]


@dataclass(frozen=True)
class Router:
    """How a router ranks experts and weighs the ones it picked.

    A family's router casts its weights to the dtype it returns at the very end; that dtype is
    the model's, not the table's, business.
    """

    scoring: Scoring = "softmax"
    """softmax over all experts; sigmoid of each; or softmax over the picked logits alone."""
    ranking_bias: str | None = None
    """Name of the module's bias that is added to the scores for ranking, never for weighting."""
    normalise: bool = False
    """Whether the picked gates are divided by their sum (`norm_topk_prob`)."""
    normalise_epsilon: float = 0.0
    """Added to that sum before dividing, as the family does it."""
    scaling: float = 1.0
    """Factor on the gate weights, after normalising (`routed_scaling_factor`)."""
    groups: int = 1
    """Groups the experts are divided into for group-limited routing; 1 for none."""
    groups_used: int = 1
    """Groups a token may pick experts from."""
    group_score: GroupScore = "top2_sum"
    """How a group is ranked: by its best expert (V2) or by the sum of its best two (V3)."""
    sorted_top_k: bool = True
    """Whether the family sorts what it picks; an order of summation differs in the last bit."""
    score_dtype: ScoreDtype = "float32"
    """Whether scores are computed in float32 or in whatever dtype the logits have."""


@dataclass(frozen=True)
class Family:
    """How a family's router works, and where its config.json says what its layers hold."""

    router: Callable[[Settings], Router]
    mixer: Mixer
    """Counts the weights of what mixes tokens in a decoder layer."""
    width: str = "moe_intermediate_size"
    """Key of a routed expert's width."""
    dense_width: str = "intermediate_size"
    """Key of a dense layer's width."""
    shared_width: str | None = None
    """Key of the shared expert's own width; else `n_shared_experts` as wide as a routed one."""
    shared_gate: bool = False
    """Whether a gate of its own weighs the shared expert."""
    matrices: int = 3
    """Matrices of an expert: gate, up and down projection; 2 where there is no gate."""
    biases: bool = False
    """Whether the router and the experts have bias terms."""
    layer_norms: int = 2
    """Norms of the hidden width in a decoder layer."""
    moe_norms: int = 0
    """Further ones in an MoE layer."""
    norm_biases: bool = False
    single: bool = False
    """Whether a layer is a mixer or experts, not one after the other (Nemotron-H)."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What Transformers assumes where a config.json says nothing."""
    not_runnable: str | None = None
    """Why no plan can run on the family, which can only be inspected; None where one can."""


def family_of(model_type: object) -> Family:
    """The family of a `model_type`; raises LeanMoeError, naming near ones, for an unknown one."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type is None:
        raise LeanMoeError("config.json has no model_type: it is not a model's config")
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise LeanMoeError(
        f"model_type {model_type!r} is not a known mixture-of-experts family: {hint}"
        f"known are {', '.join(sorted(FAMILIES))}"
    )


def _routing(
    base: Router,
    normalise: str | None = None,
    scaling: str | None = None,
    groups: bool = False,
) -> Callable[[Settings], Router]:
    """`base`, with what the config decides: keys of the flag and the factor, and groups."""

    def router(settings: Settings) -> Router:
        found = base
        if normalise is not None:
            found = replace(found, normalise=settings.flag(normalise))
        if scaling is not None:
            found = replace(found, scaling=settings.number(scaling, 1.0))
        if groups:
            found = replace(
                found,
                groups=settings.whole("n_group", 1, least=1),
                groups_used=settings.whole("topk_group", 1, least=1),
            )
        return found if found.normalise else replace(found, normalise_epsilon=0.0)

    return router


def _deepseek_v2(settings: Settings) -> Router:
    methods = ("greedy", "group_limited_greedy")
    limited = settings.word("topk_method", "greedy", methods) == "group_limited_greedy"
    base = Router(group_score="max", sorted_top_k=False)
    return _routing(base, scaling="routed_scaling_factor", groups=limited)(settings)


def _lfm2(settings: Settings) -> Router:
    bias = "expert_bias" if settings.flag("use_expert_bias") else None
    base = Router("sigmoid", bias, normalise_epsilon=1e-6, score_dtype="logits")
    return _routing(base, "norm_topk_prob", "routed_scaling_factor")(settings)


def _cohere(settings: Settings) -> Router:
    function = settings.word("expert_selection_fn", "softmax", ("softmax", "sigmoid"))
    if function == "softmax":
        return Router("softmax_after_top_k")
    return _routing(Router("sigmoid", score_dtype="logits"), "norm_topk_prob")(settings)


_BIAS = "e_score_correction_bias"
_SOFTMAX = _routing(Router(), "norm_topk_prob")
_SOFTMAX_NORMALISED = _routing(Router(normalise=True))
_SOFTMAX_AFTER_TOP_K = _routing(Router("softmax_after_top_k", score_dtype="logits"))
_SIGMOID = Router("sigmoid", _BIAS, normalise_epsilon=1e-20, sorted_top_k=False)
_SIGMOID_NORMALISED = Router("sigmoid", _BIAS, normalise=True)
_DEEPSEEK_V3 = _routing(_SIGMOID, "norm_topk_prob", "routed_scaling_factor", groups=True)


def _defaults(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


_V3 = Family(
    _DEEPSEEK_V3,
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
_GLM = replace(
    _V3,
    mixer=attention(norm="head", norm_flag="use_qk_norm"),
    defaults=_defaults(first_k_dense_replace=1, norm_topk_prob=True, n_shared_experts=1),
)
_QWEN2 = Family(
    _SOFTMAX,
    attention(bias="qkv_bias"),
    shared_width="shared_expert_intermediate_size",
    shared_gate=True,
    defaults=_defaults(qkv_bias=True),
)
_QWEN3 = Family(_SOFTMAX, attention(norm="head", output_bias=True))
_QWEN3_NEXT = replace(
    _QWEN2,
    mixer=hybrid(attention(norm="head", gate="element"), gated_delta_net),
    defaults=_defaults(norm_topk_prob=True, full_attention_interval=4),
)
_QWEN3_5 = replace(_QWEN3_NEXT, router=_SOFTMAX_NORMALISED)
_MIXTRAL = Family(_SOFTMAX_NORMALISED, attention(bias=False), width="intermediate_size")
_GRANITE = Family(_SOFTMAX_AFTER_TOP_K, attention(output_bias=True), width="intermediate_size")
_GRANITE_SHARED = replace(_GRANITE, shared_width="shared_intermediate_size")
_M3 = replace(
    _MIXTRAL,
    router=_routing(replace(_SIGMOID_NORMALISED, sorted_top_k=False)),
    mixer=attention(bias=False, norm="head"),
    dense_width="dense_intermediate_size",
    shared_width="shared_intermediate_size",
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": replace(_V3, router=_deepseek_v2, defaults=_defaults(n_shared_experts=2)),
    "deepseek_v3": _V3,
    "deepseek_v32": replace(_V3, mixer=latent_attention(indexer=True)),
    "kimi_k2": _V3,
    "axk1": replace(
        _V3, moe_norms=1, defaults=_defaults(**{**_V3.defaults, "first_k_dense_replace": 1})
    ),
    "glm4_moe": _GLM,
    "glm4v_moe_text": replace(_GLM, mixer=attention()),
    "glm4_moe_lite": replace(_GLM, mixer=latent_attention()),
    "glm_moe_dsa": replace(
        _GLM,
        mixer=latent_attention(indexer=True),
        defaults=_defaults(**{**_V3.defaults, "n_group": 1, "topk_group": 1}),
    ),
    "solar_open": replace(_GLM, mixer=attention(), defaults=_defaults(norm_topk_prob=True)),
    "dots1": replace(_GLM, mixer=attention(norm="head", output_bias=True), defaults=_defaults()),
    "exaone_moe": replace(_GLM, mixer=attention(bias=False, norm="head")),
    "mimo_v2_flash": replace(
        _GLM,
        mixer=window_and_full,
        defaults=_defaults(first_k_dense_replace=1, norm_topk_prob=True),
    ),
    "mistral4": replace(
        _V3,
        router=_routing(
            Router(normalise_epsilon=1e-20, sorted_top_k=False, score_dtype="logits"),
            "norm_topk_prob",
            "routed_scaling_factor",
            groups=True,
        ),
        defaults=_defaults(norm_topk_prob=True, n_shared_experts=1),
    ),
    "kimi_linear": replace(
        _V3,
        mixer=hybrid(latent_attention(), kimi_delta()),
        defaults=_defaults(first_k_dense_replace=1, norm_topk_prob=True, n_shared_experts=1),
    ),
    "bailing_hybrid": replace(
        _V3,
        mixer=hybrid(latent_attention(gate="head"), kimi_delta(low_rank=False)),
        defaults=_defaults(**{**_V3.defaults, "first_k_dense_replace": 2}),
    ),
    "hy_v3": Family(
        _routing(replace(_SIGMOID, normalise=True), scaling="routed_scaling_factor"),
        attention(norm="head", output_bias=True),
        defaults=_defaults(first_k_dense_replace=1, n_shared_experts=1),
    ),
    "afmoe": Family(
        _routing(
            replace(_SIGMOID, ranking_bias="expert_bias", normalise=True, sorted_top_k=True),
            scaling="routed_scaling_factor",
        ),
        attention(norm="head", gate="element", output_bias=True),
        layer_norms=4,
        defaults=_defaults(first_k_dense_replace=1),
    ),
    "laguna": Family(
        _routing(_SIGMOID_NORMALISED),
        attention(norm="head", gate="head", output_bias=True),
        shared_width="shared_expert_intermediate_size",
        defaults=_defaults(first_k_dense_replace=1),
    ),
    "flint": Family(
        _routing(Router("sigmoid"), "norm_topk_prob"),
        attention(norm="head", sinks=True, output_bias=True),
        shared_width="shared_expert_intermediate_size",
        defaults=_defaults(norm_topk_prob=True, mlp_only_layers=[0, 1]),
    ),
    "lfm2_moe": Family(
        _lfm2,
        hybrid(attention(bias=False, norm="head"), short_convolution),
        defaults=_defaults(
            first_k_dense_replace=2,
            norm_topk_prob=True,
            use_expert_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "nemotron_h": replace(
        _GLM,
        mixer=hybrid(attention(output_bias=True), mamba2),
        shared_width="moe_shared_expert_intermediate_size",
        matrices=2,
        layer_norms=1,
        single=True,
        defaults=_defaults(norm_topk_prob=True, n_shared_experts=1),
    ),
    "qwen2_moe": _QWEN2,
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe_text": replace(_QWEN3, router=_SOFTMAX_NORMALISED),
    "qwen3_omni_moe_text": replace(_QWEN3, defaults=_defaults(norm_topk_prob=True)),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_5,
    "mellum": replace(_QWEN3, defaults=_defaults(norm_topk_prob=True)),
    "olmoe": Family(_SOFTMAX, attention(norm="full", output_bias=True), width="intermediate_size"),
    "flex_olmo": Family(
        _SOFTMAX, attention(norm="full", output_bias=True), width="intermediate_size"
    ),
    "jamba": Family(
        _routing(Router()),
        hybrid(attention(bias=False), mamba),
        width="intermediate_size",
        defaults=_defaults(
            attn_layer_period=8, attn_layer_offset=4, expert_layer_period=2, expert_layer_offset=1
        ),
    ),
    "hunyuan_v1_moe": Family(
        _SOFTMAX_NORMALISED,
        attention(norm="head", output_bias=True),
        width="intermediate_size",
        shared_width="intermediate_size",
    ),
    "mixtral": _MIXTRAL,
    "minimax": replace(_MIXTRAL, mixer=hybrid(attention(bias=False), lightning_attention)),
    "minimax_m2": replace(
        _MIXTRAL,
        router=_routing(replace(_SIGMOID_NORMALISED, sorted_top_k=False)),
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
    "granitemoehybrid": replace(_GRANITE_SHARED, mixer=hybrid(attention(output_bias=True), mamba2)),
    "aria_text": Family(_SOFTMAX_AFTER_TOP_K, attention(output_bias=True), "intermediate_size"),
    "cohere2_moe": Family(
        _cohere,
        attention(output_bias=True),
        width="intermediate_size",
        dense_width="prefix_dense_intermediate_size",
        layer_norms=1,
        defaults=_defaults(norm_topk_prob=True, tie_word_embeddings=True),
    ),
    "ernie4_5_moe": Family(
        _routing(Router(ranking_bias=f"moe_statics.{_BIAS}", normalise=True)),
        attention(bias="use_bias", output_bias=True),
        defaults=_defaults(first_k_dense_replace=1, n_shared_experts=2, tie_word_embeddings=True),
    ),
    "phimoe": Family(
        _routing(Router()),
        attention(output_bias=True),
        width="intermediate_size",
        norm_biases=True,
        not_runnable="its router masks the best expert's rivals before it picks a second one",
    ),
}
"""By config.json's `model_type`."""
