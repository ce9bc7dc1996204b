"""Id -1 at any step size in vLLM's Triton experts, with stand-ins for what its versions do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, Gate, experts_reference
from leanmoe.serve.vllm.skipped_slots import (
    ASSIGN,
    GATES,
    MODULE,
    ROWS,
    LeanmoeExperts,
    SkippingActivation,
    SkippingSum,
    all_sizes_unsupported_reason,
    check_experts,
    drawn_ids,
    drops,
    leaves_out,
    warm_up,
    weights_of,
)
from leanmoe.serve.vllm.small_steps import LayerSteps
from tests.kernels.layers import random_call, random_layer
from tests.serve.stand_ins import loaded_runner
from tests.serve.vllm_operators import (
    VERSIONS,
    align,
    align_of_0_24,
    align_that_wraps,
    deaf_sum,
    install_operators,
    pad_aware_sum,
    sum_of_0_24,
    triton_runner,
)

ELSEWHERE = torch.tensor([*range(32), *[-1] * 32], dtype=torch.int32).roll(16)
"""Where 32 of 64 experts are on this GPU."""


@pytest.mark.parametrize("where", [None, ELSEWHERE], ids=["one GPU", "expert parallel"])
@pytest.mark.parametrize("version", VERSIONS)
def test_operators_that_leave_slots_out_pass(
    monkeypatch: pytest.MonkeyPatch, version: str, where: Tensor | None
) -> None:
    install_operators(monkeypatch, version=version)
    runner = loaded_runner(expert_map=where)
    assert all_sizes_unsupported_reason(runner, [4, 3, 0], 64) is None


def test_0_24_is_not_run_with_an_id_it_would_count_outside_of_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_operators(monkeypatch, align_of_0_24, sum_of_0_24)
    reason = all_sizes_unsupported_reason(loaded_runner(), [4], 64)
    assert "moe_sum adds up all slots" in str(reason)


@pytest.mark.parametrize(
    ("alignment", "moe_sum", "reason"),
    [
        (align_of_0_24, pad_aware_sum, r"fail on id -1 \(AssertionError\)"),
        (align_that_wraps, pad_aware_sum, "alignment does not drop -1"),
        (align, deaf_sum, "moe_sum does not leave -1 out"),
    ],
)
def test_operators_that_take_the_slot_for_an_experts_are_found_out(
    monkeypatch: pytest.MonkeyPatch, alignment: Any, moe_sum: Any, reason: str
) -> None:
    install_operators(monkeypatch, alignment, moe_sum)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(all_sizes_unsupported_reason(loaded_runner(), [4], 64))


def test_a_vllm_without_the_functions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install_operators(monkeypatch)
    monkeypatch.delattr(sys.modules[MODULE], ASSIGN)
    reason = all_sizes_unsupported_reason(loaded_runner(), [4], 64)
    assert "have no _prepare_expert_assignment" in str(reason)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"experts": "TritonOrDeepGemmExperts"}, "experts are TritonOrDeepGemmExperts"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"use_int4_w4a16": True}, "integers"),
        ({"quant_dtype": torch.float8_e4m3fn}, "share one scale"),
        ({"pcp_size": 2}, "prefill context parallelism"),
        ({"dp_size": 2, "all2all_backend": "deepep_high_throughput"}, "by deepep_high"),
        ({"is_sequence_parallel": True, "all2all_backend": "pplx"}, "exchanged by pplx"),
    ],
)
def test_layers_whose_other_rows_would_change_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    install_operators(monkeypatch)
    found = all_sizes_unsupported_reason(loaded_runner(**settings), [4], 64)
    assert reason in str(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_dtype": torch.float8_e4m3fn, "block_shape": [128, 128]},
        {"quant_dtype": torch.float8_e4m3fn, "per_act_token_quant": True},
        {"quant_dtype": torch.float8_e4m3fn, "a2_scale": torch.ones(1)},
        {"dp_size": 2},
        {"is_sequence_parallel": True},
        {"eplb_state": "its tables"},
    ],
    ids=str,
)
def test_layers_whose_rows_are_their_own_skip(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    install_operators(monkeypatch)
    assert all_sizes_unsupported_reason(loaded_runner(**settings), [4], 64) is None


@pytest.mark.parametrize("rows", ROWS)
def test_what_is_tried_has_slots_of_both_kinds(rows: int) -> None:
    ids_TK = drawn_ids(rows, 8, 64)
    assert ids_TK.shape == (rows, 8)
    assert bool((ids_TK >= 0).any())
    assert rows == 1 or ids_TK[0].tolist() == [-1] * 8
    named = [row[row >= 0] for row in ids_TK]
    assert all(len(set(row.tolist())) == len(row) for row in named)


def test_a_trial_fails_for_one_slot_in_the_wrong_block() -> None:
    ids_TK = drawn_ids(40, 4, 64)

    def swapped(*step: Any) -> Any:
        order, blocks, rows = align(*step)
        blocks[0] += 1
        return order, blocks, rows

    assert drops(align, ids_TK, 64, None)
    assert not drops(swapped, ids_TK, 64, None)
    assert leaves_out(pad_aware_sum, ids_TK, None)


@pytest.mark.parametrize(("is_in_host_memory", "leaves_out"), [(False, True), (True, False)])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("where", [None, ELSEWHERE], ids=["one GPU", "expert parallel"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("is_grouped", [False, True])
def test_nan_in_experts_that_are_skipped_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    where: Tensor | None,
    rows: int,
    is_grouped: bool,
    is_in_host_memory: bool,
    leaves_out: bool,
) -> None:
    install_operators(monkeypatch, version=version)
    runner = triton_runner(version, experts=64 if where is None else 32)
    layer, experts = runner.routed_experts, runner.routed_experts.quant_method.moe_kernel
    layer.w13_weight._vllm_is_uva_offloaded = is_in_host_memory
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=generator)
    ids_TK = drawn_ids(rows, 4, 64)
    weights_TK = torch.rand(rows, 4, generator=generator).masked_fill(ids_TK < 0, 0)
    used = set(ids_TK[ids_TK >= 0].tolist())
    local = {e: e if where is None else int(where[e]) for e in range(64)}
    wanted = torch.zeros(rows, 8)
    for row, slots in enumerate(ids_TK.tolist()):
        for place, expert in enumerate(slots):
            if expert >= 0 and local[expert] >= 0:
                gate, up = (layer.w13_weight[local[expert]] @ hidden[row]).chunk(2)
                product = layer.w2_weight[local[expert]] @ (torch.nn.functional.silu(gate) * up)
                wanted[row] += weights_TK[row, place] * product
    for expert in set(range(64)) - used:
        if local[expert] >= 0:
            layer.w13_weight[local[expert]] = layer.w2_weight[local[expert]] = float("nan")
    LayerSteps(runner, lambda _: is_grouped, lambda _: True).put()
    experts.fused_experts.activation.leaves_out = leaves_out
    output = torch.full_like(hidden, float("nan"))
    experts.fused_experts.apply(
        output=output, hidden_states=hidden, w1=layer.w13_weight, w2=layer.w2_weight,
        topk_weights=weights_TK, topk_ids=ids_TK, expert_map=where,
    )  # fmt: skip
    torch.testing.assert_close(output, wanted)


def test_a_step_without_such_slots_is_summed_as_vllm_does() -> None:
    asked: list[Any] = []
    skipping = SkippingSum(lambda *step, **named: asked.append((len(step), named)))
    rows, output = torch.zeros(1, 2, 4), torch.zeros(1, 4)
    skipping(rows, output)
    skipping(rows, output, torch.zeros(1, 2), expert_map=None)
    assert asked == [(2, {}), (3, {"expert_map": None})]


def _limited(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate.clamp(max=7)) * up.clamp(-7, 7)


@pytest.mark.parametrize(
    ("stock", "is_taken"),
    [
        (lambda gate, up: torch.nn.functional.silu(gate) * up, True),
        (lambda gate, up: torch.nn.functional.gelu(gate) * up, False),
        (lambda gate, up: gate * torch.sigmoid(1.702 * gate) * (up + 1), False),
        (_limited, False),
    ],
    ids=["silu", "gelu", "gpt-oss", "with a limit"],
)
def test_rows_are_left_out_of_the_activation_where_it_gives_the_same(
    stock: Any, is_taken: bool
) -> None:
    def activation(kind: Any, output: Tensor, input: Tensor, **named: Any) -> None:
        assert kind == "silu"
        assert not named
        output.copy_(stock(*input.chunk(2, dim=1)))

    kernel = SimpleNamespace(fused_experts=SimpleNamespace(activation=activation))
    layer = SimpleNamespace(
        quant_method=SimpleNamespace(moe_kernel=kernel), activation="silu",
        w13_weight=SimpleNamespace(is_cuda=True, device="cpu"),
    )  # fmt: skip
    sums = SkippingSum(lambda *_: None)
    skipping = SkippingActivation(layer, sums)
    assert skipping.leaves_out == is_taken
    rows_XM = torch.randn(4, 8)
    sums.step = (torch.tensor([[0, -1], [-1, 5]], dtype=torch.int32), None)
    output = torch.full((4, 4), -7.0)
    skipping("silu", output, rows_XM)
    assert (output == -7).all(1).tolist() == (
        [False, True, True, False] if is_taken else [False] * 4
    )
    sums.step = None
    skipping("silu", output, rows_XM)
    torch.testing.assert_close(output, stock(*rows_XM.chunk(2, dim=1)))


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
        name = "leanmoe.serve.vllm.skipped_slots.experts_gpu"
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
