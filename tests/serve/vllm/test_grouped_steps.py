"""Small steps whose tokens share experts are grouped for vLLM's kernel, others as vLLM does it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.models.routers import Router
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.skipped_slots import Skipped, repeat_best
from leanmoe.serve.vllm import grouped_steps
from leanmoe.serve.vllm.layer_routing import LayerRouting
from leanmoe.serve.vllm.skipping import Skipping
from tests.serve.stand_ins import FusedTopKRouter, install_context

MODEL = Fingerprint("Model", 3, 1, 64, 4)
PLUGIN = Skipping(small=Skipped.MINUS_ONE, groups=True)


@pytest.fixture
def triton_moe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's two modules, as far as a step's slots are assigned in them."""
    functions, module = ModuleType("functions"), ModuleType("triton_moe")

    def moe_align_block_size(*arguments: Any) -> str:
        return f"grouped in {arguments[1]}"

    def assign(*arguments: Any, block_shape: None) -> str:
        del arguments, block_shape
        return "as vLLM has it"

    assign.__module__ = "functions"
    functions.moe_align_block_size = moe_align_block_size  # type: ignore[attr-defined]
    module._prepare_expert_assignment = assign  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "functions", functions)
    monkeypatch.setitem(sys.modules, grouped_steps.MODULE, module)
    yield module
    grouped_steps.ask(torch.empty(0))


def assigned(module: Any, ids: Tensor, places: Tensor | None = None) -> str:
    found: str = module._prepare_expert_assignment(
        ids, {"BLOCK_SIZE_M": 16}, *ids.shape, 64, places, block_shape=None
    )
    return found


def routed(monkeypatch: pytest.MonkeyPatch, rows: int, rule: Rule, how: Skipping) -> Tensor:
    install_context(monkeypatch, None)
    routing = LayerRouting(FusedTopKRouter(), Plan.uniform(MODEL, rule), 0)
    routing.skipping = how
    logits = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    _weights, ids = routing(torch.empty(rows, 1), logits, None)
    wanted = route(logits[None], Router(normalise=True), 4, rule).ids_BTK[0]
    if how.is_grouped(rule, rows, ids.shape[1], 64):
        assert ids.tolist() == repeat_best(wanted, 64).tolist()
    return ids


@pytest.mark.parametrize(
    ("rule", "rows", "how", "is_grouped"),
    [
        (Rule(guaranteed=1), 4, PLUGIN, True),
        (Rule(budget=5), 2, PLUGIN, True),
        (Rule(guaranteed=1), 1, PLUGIN, False),
        (Rule(guaranteed=1), 5, PLUGIN, False),
        (Rule(threshold=0.5), 4, PLUGIN, False),
        (Rule(top_k=2), 4, PLUGIN, False),
        (Rule(guaranteed=1), 4, Skipping(small=Skipped.MINUS_ONE), False),
    ],
    ids=str,
)
def test_small_steps_whose_tokens_share_experts_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
    triton_moe: Any,
    rule: Rule,
    rows: int,
    how: Skipping,
    is_grouped: bool,
) -> None:
    assert grouped_steps.why_not_group() is None
    grouped_steps.put()
    grouped_steps.put()  # again
    ids = routed(monkeypatch, rows, rule, how)
    assert assigned(triton_moe, ids) == ("grouped in 16" if is_grouped else "as vLLM has it")
    assert assigned(triton_moe, ids) == "as vLLM has it", "what was asked for holds once"


def test_only_the_ids_that_were_asked_for_are_grouped(triton_moe: Any) -> None:
    grouped_steps.put()
    ids, others = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.int32)
    grouped_steps.ask(ids)
    assert assigned(triton_moe, others) == "as vLLM has it"
    grouped_steps.ask(ids)
    assert assigned(triton_moe, ids, torch.arange(64)) == "as vLLM has it"


def test_a_vllm_without_the_functions_is_told(triton_moe: Any) -> None:
    del triton_moe._prepare_expert_assignment
    assert "have no _prepare_expert_assignment" in str(grouped_steps.why_not_group())
