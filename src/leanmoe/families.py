"""How each model family's router turns logits into experts and weights: written down once.

Only what truly differs per family stands here; the sizes come from config.json (`shape.py`).
Needs no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from leanmoe.errors import LeanMoeError

Scoring = Literal["softmax", "sigmoid", "softmax_after_top_k"]
GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True)
class Router:
    """How a router ranks experts and weighs the ones it picked."""

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


Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Where a family's config.json says what, and how its router works.

    Each field naming a key is None where the family has no such key.
    """

    router: Callable[[Config], Router]
    experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    shared: str | None = None
    """Key of the number of shared experts, each as wide as a routed one."""
    shared_width: str | None = None
    """Key of the shared expert's width, for families that have one of its own width."""
    first_moe: str | None = None
    """Key of the number of dense layers before the first MoE layer."""
    step: str | None = None
    """Key of the distance between MoE layers."""
    dense_only: str | None = None
    """Key of the list of layers that are dense all the same."""
    router_bias: bool = False
    """Whether the router's logits have a bias term."""


def family_of(config: Config) -> Family:
    """The family of a config.json; raises LeanMoeError, naming near ones, for an unknown one."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise LeanMoeError(
        f"model_type {model_type!r} is not a known mixture-of-experts family: {hint}"
        f"known are {', '.join(sorted(FAMILIES))}"
    )


def _deepseek_v2(config: Config) -> Router:
    limited = config.get("topk_method") == "group_limited_greedy"
    return Router(
        scaling=float(config.get("routed_scaling_factor", 1.0)),
        groups=int(config.get("n_group") or 1) if limited else 1,
        groups_used=int(config.get("topk_group") or 1) if limited else 1,
        group_score="max",
        sorted_top_k=False,
    )


def _deepseek_v3(config: Config) -> Router:
    return Router(
        scoring="sigmoid",
        ranking_bias="e_score_correction_bias",
        normalise=bool(config.get("norm_topk_prob", True)),
        normalise_epsilon=1e-20,
        scaling=float(config.get("routed_scaling_factor", 1.0)),
        groups=int(config.get("n_group") or 1),
        groups_used=int(config.get("topk_group") or 1),
        sorted_top_k=False,
    )


def _softmax(config: Config) -> Router:
    return Router(normalise=bool(config.get("norm_topk_prob", False)))


def _softmax_normalised(_config: Config) -> Router:
    return Router(normalise=True)


def _softmax_after_top_k(_config: Config) -> Router:
    return Router(scoring="softmax_after_top_k")


def _ernie(_config: Config) -> Router:
    return Router(ranking_bias="moe_statics.e_score_correction_bias", normalise=True)


def _minimax_m2(_config: Config) -> Router:
    return Router(
        scoring="sigmoid",
        ranking_bias="e_score_correction_bias",
        normalise=True,
        sorted_top_k=False,
    )


_DEEPSEEK_V3 = Family(
    _deepseek_v3,
    experts="n_routed_experts",
    shared="n_shared_experts",
    first_moe="first_k_dense_replace",
)
_QWEN = Family(
    _softmax,
    step="decoder_sparse_step",
    dense_only="mlp_only_layers",
    shared_width="shared_expert_intermediate_size",
)
_OLMOE = Family(_softmax, width="intermediate_size")
_MIXTRAL = Family(_softmax_normalised, experts="num_local_experts", width="intermediate_size")
_GRANITE = Family(_softmax_after_top_k, experts="num_local_experts", width="intermediate_size")

FAMILIES: dict[str, Family] = {
    "deepseek_v2": replace(_DEEPSEEK_V3, router=_deepseek_v2),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": _DEEPSEEK_V3,
    "dots1": _DEEPSEEK_V3,
    "qwen2_moe": _QWEN,
    "qwen3_moe": replace(_QWEN, shared_width=None),
    "qwen3_next": _QWEN,
    "olmoe": _OLMOE,
    "flex_olmo": _OLMOE,
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m2": replace(_MIXTRAL, router=_minimax_m2),
    "gpt_oss": replace(_GRANITE, router_bias=True),
    "granitemoe": _GRANITE,
    "granitemoeshared": replace(_GRANITE, shared_width="shared_intermediate_size"),
    "granitemoehybrid": replace(_GRANITE, shared_width="shared_intermediate_size"),
    "ernie4_5_moe": Family(
        _ernie,
        experts="moe_num_experts",
        top_k="moe_k",
        shared="moe_num_shared_experts",
        first_moe="moe_layer_start_index",
        step="moe_layer_interval",
    ),
}
"""By config.json's `model_type`."""
