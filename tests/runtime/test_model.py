"""A loaded model: its MoE layers, what enters them, and a forward from the middle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from leanmoe.kernels.cpu.threads import openmp_functions
from leanmoe.runtime import find_layers, release_threads, resume_from
from leanmoe.runtime.model import batching_reason, keep_hidden
from tests.runtime.families import build
from tests.runtime.test_apply import logits


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "gpt_oss"])
def test_resuming_gives_the_logits_of_the_whole_model(family: str) -> None:
    model = build(family)
    with keep_hidden(model, [1, 2]) as kept:
        logits(model)
    stock = logits(model)
    for index, hidden in kept.items():
        with resume_from(model, index, hidden):
            assert torch.equal(logits(model), stock)
    assert torch.equal(logits(model), stock)


def test_one_experts_rows_are_those_of_all_outputs() -> None:
    layer = find_layers(build("qwen3_moe"))[0]
    hidden_TD = torch.randn(3, layer.experts.down_proj.shape[1])
    ids_TK = torch.tensor([[0, 2], [2, 1], [layer.experts.num_experts, 0]])
    seen = 0
    with torch.inference_mode():
        whole_TED = layer.all_outputs(hidden_TD)
        for expert, rows_X, slots_X, outputs_XD in layer.outputs_by_expert(hidden_TD, ids_TK):
            assert ids_TK[rows_X, slots_X].eq(expert).all()
            torch.testing.assert_close(outputs_XD, whole_TED[rows_X, expert])
            seen += len(rows_X)
    assert seen == 5, "a skipped slot has no row"


def test_released_threads_come_back_with_the_next_operation() -> None:
    matrix = torch.ones(300, 300)
    assert release_threads() == bool(openmp_functions("omp_pause_resource_all"))
    assert float((matrix @ matrix).sum()) == 300.0**3


@pytest.mark.parametrize(
    ("config", "is_stateful", "reason"),
    [
        ({}, False, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False, None),
        ({"layer_types": ["full_attention", "linear_attention"]}, True, "of linear_attention"),
        ({"layer_types": None}, True, "that keep a state"),
        ({"qk_head_dim": 24, "v_head_dim": 24}, False, None),
        ({"qk_head_dim": 24, "v_head_dim": 16}, False, "keys 24 wide beside values 16 wide"),
    ],
)
def test_why_caches_cannot_be_held(
    config: dict[str, object], is_stateful: bool, reason: str | None
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config), _is_stateful=is_stateful)
    found = batching_reason(model)
    assert found is None if reason is None else found is not None and found.endswith(reason)
