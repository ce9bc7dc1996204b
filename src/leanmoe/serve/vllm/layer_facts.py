"""What one of vLLM's MoE layers says of itself, in leanmoe's terms.

That is how its router chooses, on which GPU each expert is, how ranks hear of each other's tokens,
and which class computes its experts. Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.routers import Router
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope

KNOWN = ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter")
"""Classes of routers whose choice leanmoe's routing computes; CPURouter is all of them on a CPU."""
GEMMA4 = "Gemma4Router"
"""The class whose routing function is known: a softmax, normalised, and a factor on each expert."""
SIGMOID_EPSILON = 1e-20
GATHERING = ("allgather_reducescatter", "naive")
"""Backends by which vLLM's ranks gather tokens whole, so that any number of slots will do."""
TRITON = ("vllm.model_executor.layers.fused_moe.experts.triton_moe", "TritonExperts")
"""The class whose way with small steps is known; its subclasses do more, and are not trusted."""


def router_unsupported_reason(router: Any) -> str | None:
    """Why `read_router` cannot say how a router chooses; None if it can."""
    name = type(router).__name__
    if expert_scale(router) is not None:
        return None
    if name not in KNOWN:
        return f"its router is a {name}"
    if getattr(router, "custom_routing_function", None) is not None:
        return "its router is a function of its own"
    if getattr(router, "_hash_indices_table", None) is not None:
        return "its router looks experts up by token id"
    if getattr(router, "bias_vl", None) is not None:
        return "its router has a bias of its own for images"
    if router.scoring_func not in ("softmax", "sigmoid", "sqrtsoftplus"):
        return f"its router scores by {router.scoring_func}"
    if router.scoring_func == "sqrtsoftplus" and not router.renormalize:
        return "its router scores by sqrtsoftplus and does not renormalise"
    if getattr(router, "num_fused_shared_experts", 0):
        return "its shared experts are fused into the routed ones"
    return None


def read_router(router: Any) -> Router:
    """What vLLM's router computes, its own scaling included.

    vLLM scores in float32 whatever the logits' dtype, and a softmax over the picked logits is the
    same as one over all of them, normalised.
    """
    if expert_scale(router) is not None:
        return Router(normalise=True, expert_scale="per_expert_scale")
    bias = ranking_bias(router)
    groups, used = _groups(router)
    is_scaled = groups > 1 or bias is not None or _is_grouped(router)
    is_softmax = router.scoring_func == "softmax"
    normalise = bool(router.renormalize)
    return Router(
        scoring=router.scoring_func,
        ranking_bias=None if bias is None else "e_score_correction_bias",
        normalise=normalise,
        normalise_epsilon=0.0 if is_softmax or not normalise else SIGMOID_EPSILON,
        scaling=float(getattr(router, "routed_scaling_factor", 1.0)) if is_scaled else 1.0,
        groups=groups,
        groups_used=used,
        group_score="max" if bias is None else "top2_sum",
    )


def ranking_bias(router: Any) -> Any:
    """The bias [E] that ranks experts, or None."""
    return getattr(router, "e_score_correction_bias", None)


def expert_scale(router: Any) -> Any:
    """The factor [E] that Gemma 4's own routing function puts on each expert's weight, or None."""
    owner: Any = getattr(getattr(router, "custom_routing_function", None), "__self__", None)
    return owner.per_expert_scale if type(owner).__name__ == GEMMA4 else None


def scaled(weights_TK: Tensor, ids_TK: Tensor, scale_E: Tensor | None) -> Tensor:
    """The weights times their experts' factor, if there is one; a skipped slot has weight 0."""
    if scale_E is None:
        return weights_TK
    return weights_TK * scale_E[ids_TK.long().clamp(0, len(scale_E) - 1)].to(weights_TK)


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


def scope_of(runner: Any, experts: int, cross_rank: bool) -> BatchScope:
    """Whose tokens the batch-aware rules of a layer see, and where its experts are.

    With `cross_rank` they see those of all data-parallel ranks. Each rank runs every step, one
    without requests a dummy of padding alone, and all are in the same band: so all of them take
    part in each layer.
    """
    has_others = cross_rank and runner.moe_config.dp_size > 1
    return BatchScope(placement_of(runner, experts), _summing(runner) if has_others else None)


def placement_of(runner: Any, experts: int) -> Placement | None:
    """Which rank of expert parallelism has each expert; None where each has a part of all.

    It is what vLLM's `determine_expert_map` computes, before its load balancer moves any expert.
    Raises LeanMoeError for a placement strategy that leanmoe does not know.
    """
    parallel = runner.moe_config
    if not parallel.use_ep or parallel.ep_size == 1:
        return None
    strategy = runner.expert_map_manager.placement_strategy
    if strategy == "linear":
        return Placement.linear(experts, parallel.ep_size)
    if strategy == "round_robin":
        return Placement.round_robin(experts, parallel.ep_size)
    raise LeanMoeError(
        f"{runner.layer_name}: vLLM places experts by {strategy!r}: set "
        "--expert-placement-strategy to linear or round_robin"
    )


def _summing(runner: Any) -> Callable[[Tensor], Tensor]:
    """A function that sums expert demand over the ranks that have other tokens.

    The sum is a call of NCCL on the step's stream, which a captured step holds as any other. Where
    tensor-parallel ranks divide the tokens, they too have others.
    """
    is_divided = runner.moe_config.is_sequence_parallel

    def exchange(demand: Tensor) -> Tensor:
        from vllm.distributed.parallel_state import get_dp_group, get_ep_group

        group = get_ep_group() if is_divided else get_dp_group()
        total: Tensor = group.all_reduce(demand.clone())
        return total

    return exchange


def experts_class(method: Any) -> type:
    """The class that computes a layer's experts; that of its quantisation where it says no more."""
    kernel = getattr(method, "moe_kernel", None)
    kernel = getattr(kernel, "impl", kernel)
    return type(getattr(kernel, "fused_experts", method))


def not_triton_reason(runner: Any) -> str | None:
    """Why a loaded layer is not vLLM's Triton experts alone, wherever they are."""
    experts = experts_class(runner.routed_experts.quant_method)
    if (experts.__module__, experts.__name__) != TRITON:
        return f"its experts are {experts.__name__}"
    if runner.moe_config.is_lora_enabled:
        return "it has LoRA"
    return None


def triton_unsupported_reason(runner: Any) -> str | None:
    """Why a loaded layer is not vLLM's Triton experts alone, all of them on this GPU."""
    if reason := not_triton_reason(runner):
        return reason
    if runner.routed_experts.expert_map is not None:
        return "its experts are on several GPUs"
    if runner.router.eplb_state is not None:
        return "its experts are balanced over GPUs"
    if runner.moe_config.dp_size > 1 or runner.moe_config.pcp_size > 1:
        return "its tokens are gathered from several GPUs"
    if runner.moe_config.is_sequence_parallel:
        return "its tokens are divided over GPUs"
    return None
