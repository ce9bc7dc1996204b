"""Which implementation runs is said by name, with a reason."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings

from leanmoe.kernels import ExpertWeights, choose_experts, experts_cpu, experts_reference
from leanmoe.kernels import dispatch as choose_module
from leanmoe.kernels.dispatch import repeat_best, route_ids, write_skipped
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import route
from tests.conformance.cases import Case, cases
from tests.kernels.layers import in_float64, random_layer


def test_kernel_where_it_can() -> None:
    choice = choose_experts(random_layer(dtype=torch.bfloat16), "cpu")
    assert choice.name == "cpu"
    assert choice.function is experts_cpu
    assert "bfloat16" in choice.reason


def test_reference_elsewhere_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights = random_layer()
    own = ExpertWeights(weights.gate_up, weights.down, gate=lambda both: both)
    for layer, device, reason in (
        (in_float64(weights), "cpu", "float64"),
        (own, "cpu", "function of the model's own"),
        (weights, "cuda", "the weights are on cpu"),
        (weights, "mps", "no kernel for mps"),
    ):
        choice = choose_experts(layer, device)
        assert (choice.name, choice.function) == ("reference", experts_reference)
        assert reason in choice.reason


def test_reference_when_packed_weights_do_not_fit_in_memory() -> None:
    with patch.object(choose_module, "SHARE_OF_FREE_MEMORY", 0.0):
        choice = choose_experts(random_layer(), "cpu")
    assert choice.name == "reference"
    assert "are free" in choice.reason


def test_a_skipped_slot_repeats_the_tokens_best() -> None:
    ids = torch.tensor([[3, 1, 8], [2, 8, 8], [8, 8, 8]])
    assert repeat_best(ids, 8).tolist() == [[3, 1, 3], [2, 2, 2], [0, 0, 0]]


def test_padding_repeats_the_first_tokens_best() -> None:
    ids = torch.tensor([[3, 1], [8, 8], [8, 8]])
    padding = torch.tensor([False, True, False])
    assert repeat_best(ids, 8, padding).tolist() == [[3, 1], [3, 3], [0, 0]]


def test_a_slot_that_is_passed_over_has_an_id_of_no_expert() -> None:
    ids, padding = torch.tensor([[3, 1, 8], [8, 8, 8]]), torch.tensor([False, True])
    assert write_skipped(ids, 8, padding, -1).tolist() == [[3, 1, -1], [-1, -1, -1]]
    assert write_skipped(ids, 8, padding, 8).tolist() == ids.tolist()
    repeated = write_skipped(ids, 8, padding, None)
    assert repeated.tolist() == repeat_best(ids, 8, padding).tolist()


@given(cases())
@settings(deadline=None, max_examples=100)
def test_repeated_slots_activate_no_expert(drawn: Case) -> None:
    """Whatever the rule, the experts named are those that weigh something, where any does."""
    for step in range(drawn.logits_BTE.shape[0]):
        padding = None if drawn.padding_BT is None else drawn.padding_BT[step]
        logits = drawn.logits_BTE[step]
        found = route(logits, drawn.router, drawn.top_k, drawn.rule, drawn.bias_E, padding)
        ids = repeat_best(found.ids_BTK, drawn.experts, padding)
        assert bool((ids < drawn.experts).all())
        used = set(found.ids_BTK[found.ids_BTK < drawn.experts].tolist())
        is_real_first = padding is None or (len(padding) > 0 and not bool(padding[0]))
        if used and is_real_first and bool((found.ids_BTK[:, 0] < drawn.experts).all()):
            assert set(ids.flatten().tolist()) == used


@pytest.mark.parametrize("skipped_id", [None, -1, 32])
def test_ids_for_engines_are_those_of_the_reference(skipped_id: int | None) -> None:
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([False] * 4 + [True] * 2)
    router, rule = Router(normalise=True), Rule(guaranteed=1, threshold=0.5)
    wanted = route(logits, router, 4, rule, None, padding)
    ids, weights = route_ids(logits, router, 4, rule, None, padding, skipped_id=skipped_id)
    assert ids.dtype is torch.int32
    assert ids.tolist() == write_skipped(wanted.ids_BTK, 32, padding, skipped_id).tolist()
    torch.testing.assert_close(weights, wanted.weights_BTK, atol=1e-6, rtol=1e-5)
