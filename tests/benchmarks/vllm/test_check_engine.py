"""NaN in skipped experts, tried in stand-ins of vLLM's layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.vllm.check_engine import bits, fill_nan, make_values, of_layer
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.small_steps import LayerSteps, Skipped, Skipping
from tests.serve.stand_ins import FusedTopKRouter, install_context
from tests.serve.vllm_operators import install_operators, triton_runner

PLAN = Plan.uniform(Fingerprint("Model", 3, 1, 64, 4), Rule(budget=16, threshold=0.6))


def layer_of(routing: VllmLayerRouting, is_told: bool) -> Any:
    """A loaded layer whose sum is told of skipped slots, or is not."""
    runner = triton_runner("0.26")
    experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
    LayerSteps(runner, routing.groups_step, routing.skips_step if is_told else None).put()

    def select_experts(*, hidden_states: Tensor, router_logits: Tensor, **_: Any) -> Any:
        return routing(hidden_states, router_logits, None)

    def apply(layer: Any, rows: Tensor, weights: Tensor, ids: Tensor, *_: None) -> Tensor:
        output = torch.empty(rows.shape)
        experts.apply(
            output=output, hidden_states=rows.float(), w1=layer.w13_weight, w2=layer.w2_weight,
            topk_weights=weights, topk_ids=ids, expert_map=None,
        )  # fmt: skip
        return output

    runner.router = SimpleNamespace(select_experts=select_experts)
    runner.routed_experts.quant_method.topk_indices_dtype = None
    runner.routed_experts.quant_method.apply = apply
    return runner


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("rows", [2, 40])
def test_the_trial_tells_a_sum_that_skips_from_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, rows: int, is_told: bool
) -> None:
    install_context(monkeypatch, None)
    install_operators(monkeypatch, version="0.26")
    routing = VllmLayerRouting(FusedTopKRouter(), PLAN, 0)
    routing.skipping = Skipping.at_all_sizes(Skipped.MINUS_ONE, groups=True)
    runner = layer_of(routing, is_told)
    before = runner.routed_experts.w13_weight.clone()
    found = of_layer(runner, routing, rows)
    assert found["slots_skipped"] > 0
    assert found["experts_unused"] > 30
    assert (found["is_same"] and found["is_finite"]) == is_told
    assert torch.equal(runner.routed_experts.w13_weight, before)
    assert not is_told or found["apart"] < 1e-5


def test_weights_of_fp8_are_drawn_and_spoilt_by_their_bits() -> None:
    layer = triton_runner("0.26").routed_experts
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    layer.w13_weight = torch.zeros(4, 8, 8).to(torch.float8_e4m3fn)
    layer.w2_weight = torch.zeros(4, 8, 4).to(torch.float8_e4m3fn)
    config.w1_scale, config.w2_scale = torch.zeros(4, 1, 1), torch.zeros(4, 1, 1)
    make_values(layer)
    assert bool((layer.w13_weight.float() != 0).any())
    assert float(config.w2_scale.mean()) == pytest.approx(0.02)
    fill_nan(layer.w13_weight)
    assert bool(layer.w13_weight.float().isnan().all())
    assert bits(layer.w13_weight).dtype is torch.uint8
