"""What is read of vLLM's layers, with stand-ins for vLLM's objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leanmoe.models.routers import Router
from leanmoe.plan.placement import Placement
from leanmoe.routing import ALONE
from leanmoe.serve.vllm.layer_facts import (
    expert_scale,
    experts_class,
    placement_of,
    read_router,
    router_unsupported_reason,
    scaled,
    scope_of,
    triton_unsupported_reason,
)
from tests.serve.stand_ins import (
    CustomRoutingRouter,
    FusedTopKRouter,
    GroupedTopKRouter,
    gemma4_router,
    loaded_runner,
    spread,
)


def test_routers_are_read_as_vllm_has_them() -> None:
    assert read_router(FusedTopKRouter()) == Router(normalise=True, group_score="max")
    router = read_router(GroupedTopKRouter())
    assert (router.groups, router.groups_used, router.group_score) == (4, 2, "top2_sum")
    assert router.scaling == 2.5
    root = FusedTopKRouter()
    root.scoring_func = "sqrtsoftplus"
    assert router_unsupported_reason(root) is None
    assert read_router(root) == Router("sqrtsoftplus", None, True, 1e-20, group_score="max")
    too_few = GroupedTopKRouter()
    too_few.num_expert_group = 3
    assert not read_router(too_few).limits_groups


def test_gemma_4_has_a_factor_on_each_expert() -> None:
    router = gemma4_router()
    assert router_unsupported_reason(router) is None
    assert read_router(router) == Router(normalise=True, expert_scale="per_expert_scale")
    scale_E = expert_scale(router)
    weights_TK, ids_TK = torch.tensor([[0.5, 0.25, 0.0, 0.0]]), torch.tensor([[0, 15, 16, -1]])
    assert scaled(weights_TK, ids_TK, scale_E).tolist() == [[0.25, 0.5, 0.0, 0.0]]
    assert scaled(weights_TK, ids_TK, expert_scale(FusedTopKRouter())) is weights_TK
    router.custom_routing_function = len
    assert "CustomRoutingRouter" in str(router_unsupported_reason(router))


def test_routers_that_cannot_be_read_say_why() -> None:
    assert "CustomRoutingRouter" in str(router_unsupported_reason(CustomRoutingRouter()))
    odd = FusedTopKRouter()
    odd.scoring_func = "tanh"
    assert "scores by tanh" in str(router_unsupported_reason(odd))
    odd.scoring_func, odd.renormalize = "sqrtsoftplus", False
    assert "does not renormalise" in str(router_unsupported_reason(odd))
    fused = FusedTopKRouter()
    fused.num_fused_shared_experts = 1  # type: ignore[attr-defined]
    assert "shared experts" in str(router_unsupported_reason(fused))


def test_experts_are_where_vllm_has_them() -> None:
    for strategy, expected in (
        ("linear", Placement.linear(16, 3)),
        ("round_robin", Placement.round_robin(16, 3)),
    ):
        for rank in range(3):
            layer = spread(3, rank, strategy)
            assert scope_of(layer, 16, False).placement == expected
    assert scope_of(spread(1), 16, True) == ALONE
    assert scope_of(spread(2, data=2), 16, False).exchange is None
    assert scope_of(spread(2, data=2), 16, True).exchange is not None


def test_each_rank_has_a_part_of_all_experts_without_expert_parallelism() -> None:
    assert placement_of(spread(1), 16) is None
    assert placement_of(spread(2), 16) == Placement.linear(16, 2)


def test_the_class_of_a_layers_experts_is_found_in_its_kernel() -> None:
    method = loaded_runner("FlashInferExperts").routed_experts.quant_method
    assert experts_class(method).__name__ == "FlashInferExperts"
    del method.moe_kernel
    assert experts_class(method) is type(method)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"experts": "TritonOrDeepGemmExperts"}, "experts are TritonOrDeepGemmExperts"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"expert_map": torch.zeros(1)}, "on several GPUs"),
    ],
)
def test_only_tritons_experts_alone_are_plain(settings: dict[str, Any], reason: str) -> None:
    assert triton_unsupported_reason(loaded_runner()) is None
    assert reason in str(triton_unsupported_reason(loaded_runner(**settings)))
