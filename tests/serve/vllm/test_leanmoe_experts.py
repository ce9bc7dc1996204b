"""leanmoe's kernels in the place of vLLM's experts, with stand-ins for vLLM's objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, Gate, experts_reference
from leanmoe.serve.vllm.leanmoe_experts import (
    GATES,
    LeanmoeExperts,
    check_experts,
    warm_up,
    weights_of,
)
from tests.kernels.layers import random_call, random_layer
from tests.serve.stand_ins import loaded_runner

HERE = "cuda" if torch.cuda.is_available() else "cpu"


def runner_of(layer: ExpertWeights, activation: str, **settings: Any) -> Any:
    """A loaded layer with these weights, as vLLM has it."""
    runner = loaded_runner(activation=activation, **settings)
    runner.routed_experts.w13_weight = torch.nn.Parameter(layer.gate_up.to(HERE), False)
    runner.routed_experts.w2_weight = torch.nn.Parameter(layer.down.to(HERE), False)
    config = runner.routed_experts.quant_method.moe_kernel.fused_experts.quant_config
    biases = (layer.gate_up_bias, layer.down_bias)
    config.w1_bias, config.w2_bias = (None if b is None else b.to(HERE) for b in biases)
    return runner


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(
    ("activation", "gate", "biased"),
    [
        ("silu", Gate(), False),
        ("gelu", Gate("gelu"), True),
        ("gelu_tanh", Gate("gelu_tanh"), False),
        ("swigluoai", Gate.gpt_oss(), True),
    ],
)
def test_the_output_is_that_of_the_reference(
    activation: str, gate: Gate, biased: bool, tokens: int
) -> None:
    is_concatenated = activation != "swigluoai"
    layer = random_layer(8, biased=biased, gate=gate, concatenated=is_concatenated)
    hidden, ids, weights = random_call(layer, tokens, 4, skipped=0.4)
    runner = runner_of(layer, activation)
    check_experts(runner, "layer 1")
    experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
    LeanmoeExperts(runner).put()
    output = torch.full_like(hidden, float("nan"), device=HERE)
    experts.apply(
        output=output,
        hidden_states=hidden.to(HERE),
        w1=None,
        topk_weights=weights.to(HERE),
        topk_ids=ids.int().to(HERE),
        expert_map=None,
        workspace13=None,
    )
    wanted = experts_reference(hidden, ids, weights, layer)
    torch.testing.assert_close(output.cpu(), wanted, atol=2e-5, rtol=1e-4)


def test_a_step_of_any_size_can_be_launched_before_vllm_serves() -> None:
    launched: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        name = "leanmoe.serve.vllm.leanmoe_experts.experts_gpu"
        patch.setattr(name, lambda hidden, ids, *_: launched.append((*hidden.shape, *ids.shape)))
        layer = random_layer(8)
        warm_up(runner_of(layer, "silu").routed_experts, 40, 4)
    assert launched == [(40, layer.down.shape[1], 40, 4)]
    warm_up(runner_of(layer, "silu").routed_experts, 3, 4)


def test_a_layer_is_read_where_it_lies() -> None:
    layer = random_layer(8)
    runner = runner_of(layer, "silu")
    weights = weights_of(runner.routed_experts)
    assert weights.gate_up.data_ptr() == runner.routed_experts.w13_weight.data_ptr()
    assert set(GATES) == {"silu", "gelu", "gelu_tanh", "swigluoai"}


@pytest.mark.parametrize(
    ("activation", "settings", "reason"),
    [
        ("silu", {"experts": "FlashInferExperts"}, "FlashInferExperts.*--moe-backend triton"),
        ("silu", {"expert_map": torch.zeros(1)}, "on several GPUs"),
        ("silu", {"quant_dtype": torch.float8_e4m3fn}, "quantised by"),
        ("silu", {"w1_scale": torch.ones(1)}, "quantised by"),
        ("silu", {"gemm1_clamp_limit": 7.0}, "silu is clamped"),
        ("swiglustep", {}, "activation is swiglustep"),
        ("silu", {"apply_router_weight_on_input": True}, "go to the input"),
    ],
)
def test_other_layers_are_refused(activation: str, settings: dict[str, Any], reason: str) -> None:
    runner = runner_of(random_layer(8), activation, **settings)
    with pytest.raises(LeanMoeError, match=f"layer 1: LEANMOE_EXPERTS=leanmoe.*{reason}"):
        check_experts(runner, "layer 1")
