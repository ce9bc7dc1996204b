"""What must hold for a plan to run in vLLM; each check refuses with one line that says what to do.

A plan never runs in part, nor a model in full under the name of a plan.
"""

from __future__ import annotations

from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton.router import MOST_TOKENS_OF_ALL
from leanmoe.plan import Rule
from leanmoe.serve.plan_support import is_plain
from leanmoe.serve.vllm.layer_facts import experts_class, placement_of, router_unsupported_reason

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


def check_router(router: Any, rules: list[Rule], top_k: int, name: str) -> None:
    """Refuses a router whose choice leanmoe cannot compute, where a rule needs that."""
    if router.top_k != top_k:
        raise LeanMoeError(
            f"{name}: vLLM gives each token {router.top_k} experts, the plan was made for {top_k}: "
            "remove the override of num_experts_per_tok"
        )
    reason = router_unsupported_reason(router)
    if reason is not None and not all(map(is_plain, rules)):
        raise LeanMoeError(f"{name}: {reason}: use a plan with top_k alone, or unset LEANMOE_PLAN")


def check_runner(runner: Any, rules: list[Rule], name: str) -> None:
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
    if takes_sets and not all(map(is_plain, rules)):
        raise LeanMoeError(
            f"{name}: {experts.__name__} cannot skip a slot: set --moe-backend marlin, or use a "
            "plan with top_k alone"
        )
    is_batch_aware = any(rule.is_batch_aware for rule in rules)
    if is_batch_aware and getattr(runner, "do_naive_dispatch_combine", False):
        raise LeanMoeError(
            f"{name}: data-parallel ranks gather their tokens before they are routed, so "
            "batch-aware rules cannot tell padding: set --moe-backend triton or "
            "--data-parallel-size 1"
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


def check_layers(built: list[int], planned: list[int]) -> None:
    """Refuses a model of which vLLM built other MoE layers than the plan has rules for."""
    if built != planned:
        raise LeanMoeError(
            f"the plan has rules for MoE layers {planned}, vLLM built {built}: this model runs "
            "outside of vLLM's MoERunner; unset LEANMOE_PLAN to run it in full"
        )
