"""How skipped slots are written, and small steps of batch-aware rules grouped, in vLLM."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.kernels.dispatch import repeat_best
from leanmoe.models.routers import Router
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.vllm import small_steps
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.padding import PaddingSource, StepPadding
from leanmoe.serve.vllm.skipped_slots import MODULE
from leanmoe.serve.vllm.small_steps import (
    FUNCTIONS,
    LayerSteps,
    Skipped,
    Skipping,
    SlotAssignment,
    grouping_unsupported_reason,
    is_small,
    small_steps_unsupported_reason,
)
from tests.serve.stand_ins import Context, FusedTopKRouter, install_context, loaded_runner
from tests.serve.vllm_operators import install_operators, triton_runner

MODEL = Fingerprint("Model", 3, 1, 64, 4)
RULE = Rule(guaranteed=1)
SKIPS = Skipping(small=Skipped.MINUS_ONE)


def functions(kernel: Any, share: int = 4) -> SimpleNamespace:
    """vLLM's module: its kernel, and how it assigns slots to blocks."""

    def assign(
        ids: Tensor, config: dict[str, int], rows: int, slots: int, experts: int, places: None
    ) -> tuple[Tensor | None, Tensor, int]:
        del config, places
        if rows * slots * share > experts:
            raise NotImplementedError("a kernel that is not there")
        return None, ids.view(-1), 0

    return SimpleNamespace(_prepare_expert_assignment=assign, fused_moe_kernel=kernel)


def kernel_that_skips(off_experts: int, write_zeros_to_output: Any) -> int:
    if off_experts == -1:
        write_zeros_to_output(0)
        return 0
    return off_experts


def kernel_that_reads(off_experts: int, write_zeros_to_output: Any) -> int:
    if off_experts < 0:
        write_zeros_to_output(0)
    return off_experts


@pytest.fixture
def vllm_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_steps, "import_module", lambda _: functions(kernel_that_skips))


@pytest.mark.parametrize(
    ("rows", "slots", "experts", "small"),
    [(4, 4, 64, True), (5, 4, 64, False), (8, 8, 256, True), (9, 8, 256, False), (1, 8, 16, False)],
)
def test_steps_are_small_as_long_as_vllm_takes_slots_alone(
    rows: int, slots: int, experts: int, small: bool
) -> None:
    assert is_small(rows, slots, experts) is small
    wanted = Skipped.MINUS_ONE if small else Skipped.REPEATED
    assert SKIPS.in_step(Rule(), rows, slots, experts) is wanted


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("rule", [RULE, Rule(top_k=3, threshold=0.5), Rule(budget=5)], ids=str)
@pytest.mark.parametrize("how", [Skipping(), SKIPS, Skipping(Skipped.BEYOND, Skipped.BEYOND)])
def test_only_the_ids_of_skipped_slots_differ(
    monkeypatch: pytest.MonkeyPatch, rows: int, rule: Rule, how: Skipping
) -> None:
    padding = torch.arange(rows) >= max(1, rows - 2)
    context = Context()
    context.is_padding = padding  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    logits = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    marked = StepPadding(PaddingSource.MARKED)
    plan = Plan.uniform(MODEL, rule)
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0, padding=marked)
    routing.skipping = how
    weights, ids = routing(torch.empty(rows, 1), logits, None)
    wanted = route(logits, Router(normalise=True), 4, rule, None, padding)
    torch.testing.assert_close(weights, wanted.weights_BTK, atol=1e-6, rtol=1e-5)
    is_skipped = wanted.ids_BTK == 64
    assert bool(is_skipped.any()) or rows == 1
    assert ids.dtype is torch.int32
    assert torch.equal(ids[~is_skipped].long(), wanted.ids_BTK[~is_skipped])
    slots = ids.shape[1]
    if how.usual is Skipped.BEYOND:
        assert set(ids[is_skipped].tolist()) <= {64}
    elif how.small is Skipped.MINUS_ONE and rows * slots * 4 <= 64:
        assert set(ids[is_skipped].tolist()) <= {-1}
    else:
        assert ids.tolist() == repeat_best(wanted.ids_BTK, 64, padding).tolist()


def test_ids_that_leave_the_layer_name_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, None)
    plan = Plan.uniform(MODEL, RULE)
    assert VllmLayerRouting(FusedTopKRouter(), plan, 0).may_skip
    assert not VllmLayerRouting(FusedTopKRouter(), plan, 0, is_full_width=True).may_skip


@pytest.mark.usefixtures("vllm_functions")
def test_plain_triton_experts_pass_over_skipped_slots() -> None:
    assert small_steps_unsupported_reason(loaded_runner(), [4, 2, 0], 64) is None
    assert (
        small_steps_unsupported_reason(loaded_runner(quant_dtype=torch.float8_e4m3fn), [4], 64)
        is None
    )


@pytest.mark.usefixtures("vllm_functions")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"experts": "TritonOrDeepGemmExperts"}, "experts are TritonOrDeepGemmExperts"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"expert_map": torch.zeros(1)}, "on several GPUs"),
        ({"eplb_state": object()}, "balanced over GPUs"),
        ({"dp_size": 2}, "gathered from several GPUs"),
        ({"pcp_size": 2}, "gathered from several GPUs"),
        ({"is_sequence_parallel": True}, "divided over GPUs"),
        ({"use_int4_w4a16": True}, "integers"),
        ({"use_int8_w8a16": True}, "integers"),
    ],
)
def test_whatever_else_is_not_trusted(settings: dict[str, Any], reason: str) -> None:
    assert reason in str(small_steps_unsupported_reason(loaded_runner(**settings), [4], 64))


def test_a_vllm_that_has_changed_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(module: Any) -> str:
        monkeypatch.setattr(small_steps, "import_module", lambda _: module)
        return str(small_steps_unsupported_reason(loaded_runner(), [4], 64))

    assert "does not pass over -1" in reason(functions(kernel_that_reads))
    assert "groups the slots" in reason(functions(kernel_that_skips, share=8))
    assert "groups the slots" in reason(SimpleNamespace(fused_moe_kernel=kernel_that_skips))


def test_a_slot_that_is_passed_over_has_the_id_of_no_expert() -> None:
    assert [each.id(64) for each in Skipped] == [None, -1, 64]


def test_the_log_says_how_skipped_slots_are_written() -> None:
    assert Skipping().describe() == "the token's best expert again, weight 0"
    assert SKIPS.describe() == "the token's best expert again, weight 0; in small steps id -1"


GROUPED = Skipping(small=Skipped.MINUS_ONE, groups=True)


@pytest.fixture
def triton_moe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module of Triton experts, as far as a step's slots are assigned in it."""

    def moe_align_block_size(*arguments: Any) -> str:
        return f"grouped in {arguments[1]}"

    def assign(*arguments: Any, block_shape: None) -> str:
        del arguments, block_shape
        return "as vLLM has it"

    install_operators(monkeypatch, moe_align_block_size)
    module = sys.modules[MODULE]
    assign.__module__ = FUNCTIONS
    module._prepare_expert_assignment = assign  # type: ignore[attr-defined]
    return module


def triton_layer(module: Any, places: Tensor | None = None) -> Any:
    """A loaded layer whose experts answer how their slots were assigned."""

    def apply(*, hidden_states: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> str:
        del hidden_states, expert_map
        assigned: str = module._prepare_expert_assignment(
            topk_ids, {"BLOCK_SIZE_M": 16}, *topk_ids.shape, 64, places, block_shape=None
        )
        return assigned

    runner = loaded_runner()
    runner.routed_experts.quant_method.moe_kernel.fused_experts.apply = apply
    return runner


def apply_of(runner: Any) -> Any:
    return runner.routed_experts.quant_method.moe_kernel.fused_experts.apply


def routed(monkeypatch: pytest.MonkeyPatch, rows: int, rule: Rule, routing: Any) -> Tensor:
    """The ids that a step gets, as in the reference where its slots are to be grouped."""
    install_context(monkeypatch, None)
    logits = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    _weights, ids = routing(torch.empty(rows, 1), logits, None)
    wanted = route(logits[None], Router(normalise=True), 4, rule).ids_BTK[0]
    if routing.skipping.is_grouped(rule, rows, ids.shape[1], 64):
        assert ids.tolist() == repeat_best(wanted, 64).tolist()
    return torch.as_tensor(ids)


@pytest.mark.parametrize(
    ("rule", "rows", "how", "is_grouped"),
    [
        (Rule(guaranteed=1), 4, GROUPED, True),
        (Rule(budget=5), 2, GROUPED, True),
        (Rule(guaranteed=1), 1, GROUPED, False),
        (Rule(guaranteed=1), 5, GROUPED, False),
        (Rule(threshold=0.5), 4, GROUPED, False),
        (Rule(top_k=2), 4, GROUPED, False),
        (Rule(guaranteed=1), 4, Skipping(small=Skipped.MINUS_ONE), False),
    ],
    ids=str,
)
def test_small_steps_of_batch_aware_rules_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
    triton_moe: Any,
    rule: Rule,
    rows: int,
    how: Skipping,
    is_grouped: bool,
) -> None:
    assert grouping_unsupported_reason() is None
    marked = StepPadding(PaddingSource.MARKED)
    plan = Plan.uniform(MODEL, rule)
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0, padding=marked)
    routing.skipping = how
    runner, other = triton_layer(triton_moe), triton_layer(triton_moe)
    LayerSteps(runner, routing.groups_step).put()
    LayerSteps(other, lambda _: False).put()
    LayerSteps(other, lambda _: True).put()  # a layer keeps the first
    assert grouping_unsupported_reason() is None
    ids = routed(monkeypatch, rows, rule, routing)
    step = {"hidden_states": torch.empty(rows, 1), "topk_ids": ids}
    assert apply_of(runner)(**step) == ("grouped in 16" if is_grouped else "as vLLM has it")
    assert apply_of(other)(**step) == "as vLLM has it", "another layer asks for itself"


def test_slots_whose_experts_are_elsewhere_are_not_grouped(triton_moe: Any) -> None:
    runner = triton_layer(triton_moe, torch.arange(64))
    LayerSteps(runner, lambda _: True).put()
    ids = torch.zeros(4, 4, dtype=torch.int32)
    assigned = apply_of(runner)(hidden_states=torch.empty(4, 1), topk_ids=ids)
    assert assigned == "as vLLM has it"


def test_experts_that_fail_leave_later_steps_as_vllm_has_them(triton_moe: Any) -> None:
    runner = triton_layer(triton_moe)
    LayerSteps(runner, lambda _: True).put()
    with pytest.raises(TypeError):
        apply_of(runner)(topk_ids=torch.zeros(4, 4, dtype=torch.int32))
    assert not SlotAssignment.put().is_grouping


def test_the_assignment_is_put_once(triton_moe: Any) -> None:
    first = SlotAssignment.put()
    assert SlotAssignment.put() is first
    assert triton_moe._prepare_expert_assignment is first


def test_a_vllm_without_the_functions_says_so(triton_moe: Any) -> None:
    del triton_moe._prepare_expert_assignment
    assert "have no _prepare_expert_assignment" in str(grouping_unsupported_reason())


@pytest.mark.parametrize("is_in_host_memory", [False, True])
def test_small_steps_that_0_33_groups_have_no_id_of_their_own(
    monkeypatch: pytest.MonkeyPatch, is_in_host_memory: bool
) -> None:
    """With --offload-backend uva it groups them, and rows that nobody wrote would be added up."""
    install_operators(monkeypatch, version="0.33")
    runner = triton_runner("0.33", quant_dtype=torch.float8_e4m3fn)
    runner.routed_experts.w2_weight._vllm_is_uva_offloaded = is_in_host_memory
    reason = small_steps_unsupported_reason(runner, [4], 64)
    assert ("where weights are in host memory" in str(reason)) == is_in_host_memory


def test_experts_that_vllm_put_in_their_place_are_noticed(triton_moe: Any) -> None:
    runner = triton_layer(triton_moe)
    steps = LayerSteps(runner, lambda _: True)
    steps.put()
    assert steps.is_in_place()
    other = triton_layer(triton_moe).routed_experts.quant_method.moe_kernel
    runner.routed_experts.quant_method.moe_kernel = other
    assert not steps.is_in_place()
