"""What one of vLLM's MoE layers is, in leanmoe's terms, and what must hold for a plan to run in it.

That is how its router chooses, on which GPU each expert is, how ranks hear of each other's tokens,
and which class computes its experts. Each check refuses with one line that says what to do: a plan
never runs in part, nor a model in full under the name of a plan. Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import release
from leanmoe.kernels.triton.route_call import MOST_TOKENS_OF_ALL
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope
from leanmoe.serve.plugin_options import is_plain

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


SETS_OF_EXPERTS = "BaseOAITritonExperts"
"""The class of experts of vLLM that take a token's experts as a set: none may be named twice."""


def check_substitution(runner: Any, name: str) -> None:
    """Refuses a layer in which vLLM puts constants in the place of some experts (MoNE).

    Its ids are rewritten behind the router, in place, and its router counts those that remain.
    """
    if getattr(runner.routed_experts, "expert_substitution", None) is not None:
        raise LeanMoeError(
            f"{name}: vLLM puts constants in the place of some of its experts (MoNE, "
            "expert_substitution): no plan can run there; unset LEANMOE_PLAN"
        )


def check_router(
    router: Any, rules: list[Rule], top_k: int, name: str, by_table: bool = False
) -> None:
    """Refuses a router whose choice leanmoe cannot compute, where a rule needs that.

    `by_table`: a step's rows are under several rules.
    """
    if router.top_k != top_k:
        raise LeanMoeError(
            f"{name}: vLLM gives each token {router.top_k} experts, the plan was made for {top_k}: "
            "remove the override of num_experts_per_tok"
        )
    reason = router_unsupported_reason(router)
    if reason is not None and (by_table or not all(map(is_plain, rules))):
        raise LeanMoeError(f"{name}: {reason}: use a plan with top_k alone, or unset LEANMOE_PLAN")


def check_runner(runner: Any, rules: list[Rule], name: str, by_table: bool = False) -> None:
    """Refuses a loaded layer that chooses experts inside its kernel, or cannot skip a slot."""
    method = runner.routed_experts.quant_method
    if method.is_monolithic:
        was_asked = hasattr(runner.router, "supports_monolithic_kernels")
        backend = "" if was_asked else "set --moe-backend triton (or marlin for MXFP4), or "
        raise LeanMoeError(
            f"{name}: {type(method).__name__} chooses experts inside its kernel: {backend}unset "
            "LEANMOE_PLAN"
        )
    experts = experts_class(method)
    takes_sets = SETS_OF_EXPERTS in [parent.__name__ for parent in experts.__mro__]
    if takes_sets and (by_table or not all(map(is_plain, rules))):
        raise LeanMoeError(
            f"{name}: {experts.__name__} cannot skip a slot: set --moe-backend marlin, or use a "
            "plan with top_k alone"
        )
    is_batch_aware = any(rule.is_batch_aware for rule in rules)
    if (is_batch_aware or by_table) and getattr(runner, "do_naive_dispatch_combine", False):
        what = "batch-aware rules cannot tell padding"
        if by_table:
            what = "prompt rules cannot tell a prompt's rows"
        raise LeanMoeError(
            f"{name}: data-parallel ranks gather their tokens before they are routed, so {what}: "
            "set --moe-backend triton or --data-parallel-size 1"
        )
    if is_batch_aware and runner.moe_config.pcp_size > 1:
        raise LeanMoeError(
            f"{name}: batch-aware rules cannot run with prefill context parallelism: set "
            "--prefill-context-parallel-size 1"
        )


def check_ranks(runner: Any, rules: list[Rule], cross_rank: bool, config: Any, name: str) -> None:
    """Refuses rules that need to know of other ranks where that is not known, or would wait."""
    parallel = runner.moe_config.moe_parallel_config
    if any(rule.budget_per_rank is not None for rule in rules):
        if parallel.use_ep and getattr(parallel, "enable_eplb", False):
            raise LeanMoeError(
                f"{name}: budget_per_rank cannot run where vLLM moves experts between GPUs: remove "
                "--enable-eplb, or use budget"
            )
        check_placement(runner, name)
    is_batch_aware = any(rule.is_batch_aware for rule in rules)
    if not (cross_rank and is_batch_aware and parallel.dp_size > 1):
        return
    if getattr(config.parallel_config, "use_ubatching", False):
        raise LeanMoeError(
            f"{name}: LEANMOE_BATCH_SCOPE=all cannot run with steps cut in two: remove --enable-dbo"
        )
    tokens = config.scheduler_config.max_num_batched_tokens
    if tokens * parallel.dp_size > MOST_TOKENS_OF_ALL:
        raise LeanMoeError(
            f"{name}: LEANMOE_BATCH_SCOPE=all counts at most {MOST_TOKENS_OF_ALL} tokens of all "
            f"ranks: {parallel.dp_size} ranks may have {tokens} each; set --max-num-batched-tokens "
            f"to {MOST_TOKENS_OF_ALL // parallel.dp_size} or fewer"
        )


def check_placement(runner: Any, name: str) -> None:
    """Refuses a vLLM that has other experts on this GPU than leanmoe takes it to have."""
    local_of_E = runner.expert_map_manager.expert_map
    experts, rank = runner.router.global_num_experts, runner.moe_config.ep_rank
    placement = placement_of(runner, experts)
    if placement is None or local_of_E is None:
        return
    held = tuple(e for e, local in enumerate(local_of_E.tolist()[:experts]) if local >= 0)
    if held != placement.experts_on(rank):
        raise LeanMoeError(
            f"{name}: vLLM has experts {list(held)} on rank {rank}, leanmoe expected "
            f"{list(placement.experts_on(rank))}: budget_per_rank cannot run; use budget"
        )


def check_skipping(number: str, repeats: str, name: str) -> None:
    """Refuses prompt rules in a vLLM none of whose experts leave skipped rows out."""
    if release(number) < (0, 26):
        raise LeanMoeError(
            f"{name}: prompt rules would save no rows in vLLM {number}: {repeats}: install 0.26 or "
            "newer, or set LEANMOE_DROP=prompt to run the bands without them"
        )


def check_row_classes(config: Any) -> None:
    """Refuses settings of vLLM's under which the rows of a prompt cannot be told apart."""
    parallel, drafts = config.parallel_config, config.speculative_config
    moving: tuple[tuple[str, Any, str, int], ...] = (
        ("--prefill-context-parallel-size", parallel, "prefill_context_parallel_size", 1),
        ("--enable-dbo", parallel, "use_ubatching", False),
        ("--kv-sharing-fast-prefill", config.cache_config, "kv_sharing_fast_prefill", False),
        ("enable_adaptive_verification", drafts, "enable_adaptive_verification", False),
    )
    given = [name for name, at, field, usual in moving if getattr(at, field, usual) != usual]
    if given:
        raise LeanMoeError(
            f"prompt rules cannot run with {given[0]}, which moves a step's rows: remove it, or "
            "set LEANMOE_DROP=prompt to run the bands without them"
        )


def check_layers(built: list[int], planned: list[int]) -> None:
    """Refuses a model of which vLLM built other MoE layers than the plan has rules for."""
    if built != planned:
        raise LeanMoeError(
            f"the plan has rules for MoE layers {planned}, vLLM built {built}: this model runs "
            "outside of vLLM's MoERunner; unset LEANMOE_PLAN to run it in full"
        )
