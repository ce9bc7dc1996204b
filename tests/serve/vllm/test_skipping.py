"""How the plugin writes skipped slots, and when it trusts vLLM's experts to pass over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.skipped_slots import Skipped, repeat_best
from leanmoe.serve.vllm import skipping
from leanmoe.serve.vllm.layer_routing import LayerRouting
from leanmoe.serve.vllm.skipping import Skipping, is_small, why_not_skip
from tests.serve.stand_ins import Context, FusedTopKRouter, install_context, loaded_runner

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
    monkeypatch.setattr(skipping, "import_module", lambda _: functions(kernel_that_skips))


@pytest.mark.parametrize(
    ("rows", "slots", "experts", "small"),
    [(4, 4, 64, True), (5, 4, 64, False), (8, 8, 256, True), (9, 8, 256, False), (1, 8, 16, False)],
)
def test_steps_are_small_as_long_as_vllm_takes_slots_alone(
    rows: int, slots: int, experts: int, small: bool
) -> None:
    assert is_small(rows, slots, experts) is small
    wanted = Skipped.MINUS_ONE if small else Skipped.REPEATED
    assert SKIPS.of(rows, slots, experts) is wanted


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
    routing = LayerRouting(FusedTopKRouter(), Plan.uniform(MODEL, rule), 0)
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
    assert LayerRouting(FusedTopKRouter(), plan, 0).may_skip
    assert not LayerRouting(FusedTopKRouter(), plan, 0, is_full_width=True).may_skip


@pytest.mark.usefixtures("vllm_functions")
def test_plain_triton_experts_pass_over_skipped_slots() -> None:
    assert why_not_skip(loaded_runner(), [4, 2, 0], 64) is None
    assert why_not_skip(loaded_runner(quant_dtype=torch.float8_e4m3fn), [4], 64) is None


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
    assert reason in str(why_not_skip(loaded_runner(**settings), [4], 64))


def test_a_vllm_that_has_changed_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(module: Any) -> str:
        monkeypatch.setattr(skipping, "import_module", lambda _: module)
        return str(why_not_skip(loaded_runner(), [4], 64))

    assert "does not pass over -1" in reason(functions(kernel_that_reads))
    assert "groups the slots" in reason(functions(kernel_that_skips, share=8))
    assert "groups the slots" in reason(SimpleNamespace(fused_moe_kernel=kernel_that_skips))


def test_the_log_says_how_skipped_slots_are_written() -> None:
    assert Skipping().describe() == "the token's best expert again, weight 0"
    assert SKIPS.describe() == "the token's best expert again, weight 0; in small steps id -1"
