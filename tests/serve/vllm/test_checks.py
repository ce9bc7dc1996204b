"""What is read of vLLM's layers, with stand-ins for vLLM's objects."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmoe.core import installed_vllm
from leanmoe.core.errors import LeanMoeError
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import ALONE
from leanmoe.serve.vllm import checks
from leanmoe.serve.vllm.checks import (
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


SHARED, FEWER = [Rule(guaranteed=2)], [Rule(top_k=2)]


class BaseOAITritonExperts:
    """Experts that take a token's experts as a set."""


class SetExperts(BaseOAITritonExperts):
    """One of them."""


def runner(experts: type = object, is_monolithic: bool = False, **more: Any) -> Any:
    kernel = SimpleNamespace(impl=SimpleNamespace(fused_experts=experts()))
    method = SimpleNamespace(is_monolithic=is_monolithic, moe_kernel=kernel)
    settings = {"do_naive_dispatch_combine": False, "pcp": 1, **more}
    return SimpleNamespace(
        router=SimpleNamespace(),
        routed_experts=SimpleNamespace(quant_method=method),
        do_naive_dispatch_combine=settings["do_naive_dispatch_combine"],
        moe_config=SimpleNamespace(pcp_size=settings["pcp"]),
    )


def test_routers_that_cannot_be_computed_run_top_k_alone() -> None:
    checks.check_router(CustomRoutingRouter(), FEWER, 4, "layer 1")
    checks.check_router(FusedTopKRouter(), SHARED, 4, "layer 1")
    with pytest.raises(LeanMoeError, match="layer 1: its router is a CustomRoutingRouter"):
        checks.check_router(CustomRoutingRouter(), SHARED, 4, "layer 1")
    with pytest.raises(LeanMoeError, match="num_experts_per_tok"):
        checks.check_router(FusedTopKRouter(), FEWER, 8, "layer 1")
    with pytest.raises(LeanMoeError, match="layer 1: its router is a CustomRoutingRouter"):
        checks.check_router(CustomRoutingRouter(), FEWER, 4, "layer 1", by_table=True)


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (runner(is_monolithic=True), "--moe-backend triton"),
        (runner(SetExperts), "SetExperts cannot skip"),
        (runner(do_naive_dispatch_combine=True), "--data-parallel-size 1"),
        (runner(pcp=2), "--prefill-context-parallel-size 1"),
    ],
)
def test_layers_that_cannot_share_experts_are_refused(loaded: Any, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        checks.check_runner(loaded, SHARED, "layer 1")
    if message != "--moe-backend triton":
        checks.check_runner(loaded, FEWER, "layer 1")


def test_layers_that_cannot_tell_prompt_rows_or_skip_them_are_refused() -> None:
    for loaded, message in (
        (runner(SetExperts), "SetExperts cannot skip"),
        (runner(do_naive_dispatch_combine=True), "prompt rules cannot tell a prompt's rows: set"),
    ):
        with pytest.raises(LeanMoeError, match=message):
            checks.check_runner(loaded, FEWER, "layer 1", by_table=True)


def test_a_vllm_that_was_asked_for_other_kernels_is_not_asked_again() -> None:
    loaded = runner(is_monolithic=True)
    loaded.router.supports_monolithic_kernels = False
    with pytest.raises(LeanMoeError, match="inside its kernel: unset LEANMOE_PLAN"):
        checks.check_runner(loaded, SHARED, "layer 1")


def test_constants_in_the_place_of_experts_are_refused() -> None:
    loaded = runner()
    checks.check_substitution(loaded, "layer 1")
    loaded.routed_experts.expert_substitution = None
    checks.check_substitution(loaded, "layer 1")
    loaded.routed_experts.expert_substitution = object()
    with pytest.raises(LeanMoeError, match=r"layer 1: .* \(MoNE, expert_substitution\)"):
        checks.check_substitution(loaded, "layer 1")


def test_layers_that_were_not_found_are_named() -> None:
    checks.check_layers([1, 2], [1, 2])
    with pytest.raises(LeanMoeError, match=r"MoE layers \[1, 2\], vLLM built \[1\]"):
        checks.check_layers([1], [1, 2])


PLACED = [Rule(budget_per_rank=2)]
FEW_TOKENS = SimpleNamespace(max_num_batched_tokens=8192)
WHOLE = SimpleNamespace(
    parallel_config=SimpleNamespace(use_ubatching=False), scheduler_config=FEW_TOKENS
)
CUT = SimpleNamespace(
    parallel_config=SimpleNamespace(use_ubatching=True), scheduler_config=FEW_TOKENS
)


def test_a_placement_that_is_not_known_is_refused() -> None:
    with pytest.raises(LeanMoeError, match=r"vLLM has experts \[0, 2, .* leanmoe expected"):
        checks.check_ranks(spread(2, held="round_robin"), PLACED, False, WHOLE, "layer 1")
    with pytest.raises(LeanMoeError, match="remove --enable-eplb"):
        checks.check_ranks(spread(2, eplb=True), PLACED, False, WHOLE, "layer 1")
    checks.check_ranks(spread(2, eplb=True), SHARED, False, WHOLE, "layer 1")
    other = spread(2)
    other.expert_map_manager.placement_strategy = "by the moon"
    with pytest.raises(LeanMoeError, match="set --expert-placement-strategy to"):
        scope_of(other, 16, False)


def test_a_step_cut_in_two_cannot_wait_for_other_ranks() -> None:
    checks.check_ranks(spread(2, data=2), SHARED, False, CUT, "layer 1")
    checks.check_ranks(spread(2, data=2), FEWER, True, CUT, "layer 1")
    with pytest.raises(LeanMoeError, match="remove --enable-dbo"):
        checks.check_ranks(spread(2, data=2), SHARED, True, CUT, "layer 1")


def test_more_tokens_than_a_sum_over_ranks_can_count_are_refused() -> None:
    checks.check_ranks(spread(2, data=32), SHARED, True, WHOLE, "layer 1")
    checks.check_ranks(spread(2, data=64), SHARED, False, WHOLE, "layer 1")
    with pytest.raises(LeanMoeError, match=r"64 ranks may have 8192 each; .* to 4096 or fewer"):
        checks.check_ranks(spread(2, data=64), SHARED, True, WHOLE, "layer 1")


def test_a_layer_that_holds_the_experts_expected_passes() -> None:
    for strategy in ("linear", "round_robin"):
        for rank in range(3):
            checks.check_ranks(spread(3, rank, strategy), PLACED, False, WHOLE, "layer 1")


def refusals() -> list[tuple[str, str]]:
    """Each refusal of the plugin: the file and function it stands in, and its words."""
    found = []
    files = [*Path(checks.__file__).parent.glob("*.py"), Path(installed_vllm.__file__)]
    for path in sorted(files):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                error = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(error, ast.Call) and ast.unparse(error.func) == "LeanMoeError":
                    words = ast.unparse(error.args[0])
                    found.append((f"{path.stem}.{function.name}", words))
    return found


REMEDIES = ("set ", "remove ", "use ", "install ", "start the engine", "{refusal[1]}")
AT_STEPS = (
    "layer_routing._skipped_id", "padding.rows", "padding._compare",
    "padding.prove", "rule_rows.rows", "rule_rows._write", "rule_rows.check",
    "installation.check_rows", "patch._adopt", "patch._patch", "installation.check_hooks",
    "installed_vllm.check_version",
)  # fmt: skip
"""What `VllmPlugin` does not give vLLM's version to, since it is not within the load of a model."""


def test_every_refusal_is_one_line_that_says_what_to_set() -> None:
    walked = refusals()
    assert len(walked) > 20
    assert {*AT_STEPS} <= {where for where, _ in walked}
    for where, words in walked:
        assert "\\n" not in words, where
        assert any(remedy in words for remedy in REMEDIES), (where, words)
        if where in AT_STEPS:
            assert "vLLM {" in words or "vLLM is {" in words, (where, words)


def test_settings_that_move_the_rows_of_a_step_are_refused_with_prompt_rules() -> None:
    parallel = SimpleNamespace(prefill_context_parallel_size=1, use_ubatching=False)
    cache, drafts = SimpleNamespace(kv_sharing_fast_prefill=False), SimpleNamespace()
    config = SimpleNamespace(
        parallel_config=parallel, cache_config=cache, speculative_config=drafts
    )
    checks.check_row_classes(config)
    for owner, field, value, named in (
        (parallel, "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        (parallel, "use_ubatching", True, "--enable-dbo"),
        (cache, "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        (drafts, "enable_adaptive_verification", True, "enable_adaptive_verification"),
    ):
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(owner, field, value, raising=False)
            with pytest.raises(LeanMoeError, match=f"cannot run with {named}, .*LEANMOE_DROP"):
                checks.check_row_classes(config)


def test_prompt_rules_are_refused_where_they_would_save_no_rows() -> None:
    checks.check_skipping("0.26.0", "it has LoRA", "layer 1")
    with pytest.raises(LeanMoeError, match=r"^layer 1: .* no rows in vLLM 0\.25\.1: it has LoRA: "):
        checks.check_skipping("0.25.1", "it has LoRA", "layer 1")
