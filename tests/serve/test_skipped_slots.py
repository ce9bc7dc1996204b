"""How skipped slots are written for engines: against the GPU kernel's own spelling too."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from leanmoe.kernels.triton.router import route_gpu, route_gpu_ids, why_not_route_gpu
from leanmoe.routing import route
from leanmoe.serve.skipped_slots import Skipped, repeat_best, spelled, widened
from tests.routing.cases import Case, cases


def test_a_skipped_slot_repeats_the_tokens_best() -> None:
    ids = torch.tensor([[3, 1, 8], [2, 8, 8], [8, 8, 8]])
    assert repeat_best(ids, 8).tolist() == [[3, 1, 3], [2, 2, 2], [0, 0, 0]]


def test_padding_repeats_the_first_tokens_best() -> None:
    ids = torch.tensor([[3, 1], [8, 8], [8, 8]])
    padding = torch.tensor([False, True, False])
    assert repeat_best(ids, 8, padding).tolist() == [[3, 1], [3, 3], [0, 0]]


def test_a_slot_that_is_passed_over_has_an_id_of_no_expert() -> None:
    ids, padding = torch.tensor([[3, 1, 8], [8, 8, 8]]), torch.tensor([False, True])
    assert spelled(ids, 8, padding, Skipped.MINUS_ONE).tolist() == [[3, 1, -1], [-1, -1, -1]]
    assert spelled(ids, 8, padding, Skipped.BEYOND).tolist() == ids.tolist()
    repeated = spelled(ids, 8, padding, Skipped.REPEATED)
    assert repeated.tolist() == repeat_best(ids, 8, padding).tolist()


def test_widened_slots_weigh_nothing() -> None:
    ids, weights = widened(torch.tensor([[4, 2]]), torch.tensor([[0.7, 0.3]]), 4)
    assert ids.tolist() == [[4, 2, 4, 4]]
    assert weights.tolist() == [[torch.tensor(0.7).item(), torch.tensor(0.3).item(), 0.0, 0.0]]
    same, _ = widened(ids, weights, 3)
    assert same is ids


@given(cases())
@settings(deadline=None, max_examples=100)
def test_no_spelling_wakes_an_expert(drawn: Case) -> None:
    """Whatever the rule, the experts named are those that weigh something, where any does."""
    for step in range(drawn.logits_BTE.shape[0]):
        padding = None if drawn.padding_BT is None else drawn.padding_BT[step]
        logits = drawn.logits_BTE[step]
        found = route(logits, drawn.router, drawn.top_k, drawn.rule, drawn.bias_E, padding)
        spelled = repeat_best(found.ids_BTK, drawn.experts, padding)
        assert bool((spelled < drawn.experts).all())
        used = set(found.ids_BTK[found.ids_BTK < drawn.experts].tolist())
        is_real_first = padding is None or (len(padding) > 0 and not bool(padding[0]))
        if used and is_real_first and bool((found.ids_BTK[:, 0] < drawn.experts).all()):
            assert set(spelled.flatten().tolist()) == used


def test_the_gpu_kernel_spells_it_the_same() -> None:
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([False] * 4 + [True] * 2)
    from leanmoe.models.routers import Router
    from leanmoe.plan import Rule

    rule, router = Rule(guaranteed=1, threshold=0.5), Router(normalise=True)
    plain = route_gpu(logits, router, 4, rule, None, padding)
    ids, weights = route_gpu_ids(logits, router, 4, rule, None, padding)
    assert ids.tolist() == repeat_best(plain.ids_TK, 32, padding).tolist()
    assert weights.tolist() == plain.weights_TK.tolist()


@given(cases(hostile=False))
@settings(deadline=None, max_examples=20)
def test_the_gpu_kernel_passes_over_the_same_slots(drawn: Case) -> None:
    logits, router, rule = drawn.logits_BTE[0], drawn.router, drawn.rule
    padding = None if drawn.padding_BT is None else drawn.padding_BT[0]
    if why_not_route_gpu(logits, router, rule) is not None:
        return
    arguments = (logits, router, drawn.top_k, rule, drawn.bias_E, padding)
    plain = route_gpu(*arguments)
    for skipped in (Skipped.MINUS_ONE, Skipped.BEYOND):
        number = skipped.id(drawn.experts)
        ids, weights = route_gpu_ids(*arguments, skipped_id=number)
        wanted = spelled(plain.ids_TK, drawn.experts, padding, skipped)
        assert ids.dtype is torch.int32
        assert ids.tolist() == wanted.tolist()
        torch.testing.assert_close(weights, plain.weights_TK, rtol=0, atol=0, equal_nan=True)
