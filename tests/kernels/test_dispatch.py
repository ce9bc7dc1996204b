"""Which implementation runs is said by name, with a reason."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import (
    ExpertWeights,
    choose_experts,
    choose_router,
    dispatch,
    experts_cpu,
    experts_gpu,
    experts_reference,
)
from leanmoe.kernels.dispatch import RowRoutes, repeat_best, route_ids, write_skipped
from leanmoe.kernels.rule_words import DeviceRules, TokenRules
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import ALONE, BatchScope, RuleTable, route, route_rows
from tests.conformance.cases import Case, cases
from tests.kernels.layers import in_float64, random_layer
from tests.kernels.triton.test_experts import DEVICE, on_device


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
    with patch.object(dispatch, "SHARE_OF_FREE_MEMORY", 0.0):
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


@pytest.mark.parametrize("rule", [Rule(top_k=2), Rule(guaranteed=1), Rule(budget=3)], ids=str)
@pytest.mark.parametrize("steps", [None, 1, 2])
def test_one_step_runs_on_the_gpu_and_many_by_the_reference(rule: Rule, steps: int | None) -> None:
    leading = () if steps is None else (steps,)
    logits = torch.randn(*leading, 5, 16, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(*leading, 5, dtype=torch.bool)
    padding[..., 2] = True
    choice = choose_router(logits.to(DEVICE), Router(), rule, device="cuda")
    assert choice.name == ("reference" if steps == 2 else "gpu")
    found = choice.function(logits.to(DEVICE), Router(), 4, rule, None, padding.to(DEVICE), ALONE)
    wanted = route(logits, Router(), 4, rule, None, padding)
    assert found.ids_BTK.shape == wanted.ids_BTK.shape
    assert found.ids_BTK.sort(dim=-1)[0].tolist() == wanted.ids_BTK.sort(dim=-1)[0].tolist()
    assert (found.over_budget_B is None) == (wanted.over_budget_B is None)
    if found.over_budget_B is not None and wanted.over_budget_B is not None:
        assert found.over_budget_B.tolist() == wanted.over_budget_B.tolist()


def test_the_kernel_is_chosen_and_says_how_it_is_tuned() -> None:
    weights = on_device(random_layer())
    choice = choose_experts(weights, "cuda")
    assert (choice.name, choice.function) == ("gpu", experts_gpu)
    assert "a guess" in choice.reason
    odd = ExpertWeights(weights.gate_up.double(), weights.down.double())
    assert choose_experts(odd, "cuda").name == "reference"


@pytest.mark.parametrize("skipped_id", [None, -1])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_table_of_rules_is_routed_by_who_can(name: str, skipped_id: int | None) -> None:
    """Where a family scores in bfloat16 that is the reference, and it says why."""
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    table = RuleTable.of(4, [(Rule(guaranteed=1), Rule(top_k=0)), (Rule(top_k=2), None)])
    router = Router(normalise=True)
    if name == "reference":
        router, logits = Router("softmax_after_top_k", score_dtype="logits"), logits.bfloat16()
    rows_T = torch.arange(6)
    tokens = TokenRules(DeviceRules([table], router, 4, 32), rows_T)
    choice = choose_router(logits, router, tokens)
    assert choice.name == name
    assert name == "cpu" or "bfloat16" in choice.reason
    wanted = route_rows(logits, router, 4, table, rows_T)
    ids, weights = route_ids(logits, router, 4, tokens, skipped_id=skipped_id)
    assert ids.tolist() == write_skipped(wanted.ids_BTK, 32, None, skipped_id).tolist()
    torch.testing.assert_close(weights, wanted.weights_BTK.float(), atol=1e-6, rtol=1e-5)


def test_a_table_is_for_its_number_of_ranks() -> None:
    table = RuleTable.of(4, [(Rule(budget_per_rank=2), None)])
    tokens = TokenRules(DeviceRules([table], Router(), 4, 8), torch.zeros(2, dtype=torch.int64))
    scope = BatchScope(Placement.linear(8, 2))
    with pytest.raises(LeanMoeError, match="for 1 ranks: the experts are on 2"):
        choose_router(torch.randn(2, 8), Router(), tokens, scope)


@pytest.mark.parametrize("skipped_id", [None, -1])
def test_rule_rows_are_those_of_the_band_that_is_there(skipped_id: int | None) -> None:
    router, rows_T = Router(normalise=True), torch.tensor([1, 2, 0, 1, 7])
    bands = [[(Rule(top_k=3), Rule(top_k=0))], [(Rule(guaranteed=1), Rule(threshold=0.5))]]
    routes = RowRoutes(bands, 4)
    assert routes.is_batch_aware
    logits_TE = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for number, levels in enumerate(bands):
        ids_TK, weights_TK = routes.ids(
            logits_TE, router, rows_T, torch.tensor([number]), skipped_id=skipped_id
        )
        wanted = route_rows(logits_TE, router, 4, RuleTable.of(4, levels), rows_T)
        assert ids_TK.tolist() == write_skipped(wanted.ids_BTK, 16, None, skipped_id).tolist()
        assert ids_TK.dtype == torch.int32
        torch.testing.assert_close(weights_TK, wanted.weights_BTK)
