"""On which GPU vLLM has each expert, and how its ranks hear of each other's tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope

GATHERING = ("allgather_reducescatter", "naive")
"""Ways of vLLM's ranks to exchange tokens that gather them whole: any number of slots will do."""


def scope_of(runner: Any, experts: int, cross_rank: bool) -> BatchScope:
    """With whom the tokens of a layer share experts, and where these are.

    `cross_rank`: with those of all data-parallel ranks. Each of them runs every step, one without
    requests a dummy of padding alone, and all are in the same band: so all meet in each layer.
    """
    shares = cross_rank and runner.moe_config.dp_size > 1
    return BatchScope(placement_of(runner, experts), _summing(runner) if shares else None)


def placement_of(runner: Any, experts: int) -> Placement | None:
    """Which rank of expert parallelism has each expert; None where each has a part of all.

    As `determine_expert_map` of vLLM has it, before its load balancer moves any.
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
        f"{runner.layer_name}: vLLM places experts by {strategy!r}: leanmoe knows linear and "
        "round_robin (--expert-placement-strategy)"
    )


def _summing(runner: Any) -> Any:
    """The sum of a ballot over the ranks that have other tokens, as vLLM adds up a layer's parts.

    That is a call of NCCL on the step's stream, which a captured step holds as any other. Where
    tensor-parallel ranks divide the tokens, they too have others.
    """
    is_divided = runner.moe_config.is_sequence_parallel

    def exchange(demand: Tensor) -> Tensor:
        from vllm.distributed.parallel_state import get_dp_group, get_ep_group

        group = get_ep_group() if is_divided else get_dp_group()
        total: Tensor = group.all_reduce(demand.clone())
        return total

    return exchange
