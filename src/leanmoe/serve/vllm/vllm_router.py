"""How one of vLLM's routers chooses, in leanmoe's terms."""

from __future__ import annotations

from typing import Any

from leanmoe.models.routers import Router

KNOWN = ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter")
"""Classes whose choice leanmoe's routing computes; CPURouter is all of them on a CPU."""
SIGMOID_EPSILON = 1e-20


def why_not_read(router: Any) -> str | None:
    """Why `read_router` cannot say how this router chooses; None if it can."""
    name = type(router).__name__
    if name not in KNOWN:
        return f"its router is a {name}"
    if getattr(router, "custom_routing_function", None) is not None:
        return "its router is a function of its own"
    if getattr(router, "_hash_indices_table", None) is not None:
        return "its router looks experts up by token id"
    if getattr(router, "bias_vl", None) is not None:
        return "its router has a bias of its own for images"
    if router.scoring_func not in ("softmax", "sigmoid"):
        return f"its router scores by {router.scoring_func}"
    if getattr(router, "num_fused_shared_experts", 0):
        return "its shared experts are fused into the routed ones"
    return None


def read_router(router: Any) -> Router:
    """What vLLM's router computes, its own scaling included.

    vLLM scores in float32 whatever the logits' dtype, and a softmax over the picked logits is the
    same as one over all of them, normalised.
    """
    bias = ranking_bias(router)
    groups, used = _groups(router)
    is_scaled = groups > 1 or bias is not None or _is_grouped(router)
    is_sigmoid = router.scoring_func == "sigmoid"
    normalise = bool(router.renormalize)
    return Router(
        scoring="sigmoid" if is_sigmoid else "softmax",
        ranking_bias=None if bias is None else "e_score_correction_bias",
        normalise=normalise,
        normalise_epsilon=SIGMOID_EPSILON if is_sigmoid and normalise else 0.0,
        scaling=float(getattr(router, "routed_scaling_factor", 1.0)) if is_scaled else 1.0,
        groups=groups,
        groups_used=used,
        group_score="max" if bias is None else "top2_sum",
    )


def ranking_bias(router: Any) -> Any:
    """The bias [E] that ranks experts, or None."""
    return getattr(router, "e_score_correction_bias", None)


def _is_grouped(router: Any) -> bool:
    return bool(getattr(router, "use_grouped_topk", type(router).__name__ == "GroupedTopKRouter"))


def _groups(router: Any) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use; one group where there are none."""
    if not _is_grouped(router):
        return 1, 1
    groups, experts = router.num_expert_group, router.global_num_experts
    if experts <= groups or experts % groups:
        return 1, 1
    return groups, router.topk_group
