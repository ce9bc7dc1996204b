"""The CPU kernel against the definition, and what it must never do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, count_work, experts_cpu, experts_reference
from tests.kernels.layers import random_call, random_layer, slot_by_slot
from tests.kernels.test_reference import LAYOUTS

NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
"""Float32 sums of some dozens of products of order 1."""


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("tokens", "slots", "experts"),
    [(1, 1, 6), (1, 8, 64), (7, 3, 6), (33, 8, 64), (5, 4, 200), (120, 2, 3), (300, 8, 16)],
)
def test_is_the_definition(tokens: int, slots: int, experts: int) -> None:
    weights = random_layer(experts)
    call = random_call(weights, tokens, slots)
    assert_close(experts_cpu(*call, weights).double(), slot_by_slot(*call, weights), **NEAR)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_and_weight_dtype(layout: dict[str, object], dtype: torch.dtype) -> None:
    weights = random_layer(dtype=dtype, **layout)  # type: ignore[arg-type]
    call = random_call(weights, tokens=17, slots=3)
    assert_close(experts_cpu(*call, weights).double(), slot_by_slot(*call, weights), **NEAR)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 20), st.integers(0, 10**6))
def test_ragged_calls(tokens: int, slots: int, experts: int, seed: int) -> None:
    weights = random_layer(experts, hidden=33, width=17, seed=seed)
    call = random_call(weights, tokens, slots, seed=seed, skipped=0.5)
    assert_close(experts_cpu(*call, weights).double(), slot_by_slot(*call, weights), **NEAR)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("expert", [0, 3, 5])
def test_all_tokens_on_one_expert_twice(expert: int) -> None:
    weights = random_layer()
    hidden_TD, _, weights_TK = random_call(weights, tokens=40, slots=2)
    ids_TK = torch.full((40, 2), expert)
    wanted_TD = slot_by_slot(hidden_TD, ids_TK, weights_TK, weights)
    found_TD = experts_cpu(hidden_TD, ids_TK, weights_TK, weights)
    assert_close(found_TD.double(), wanted_TD, **NEAR)


@pytest.mark.usefixtures("threads")
def test_skipped_slots_and_unused_experts_leak_nothing() -> None:
    weights = random_layer()
    hidden_TD, _, weights_TK = random_call(weights, tokens=5, slots=2)
    ids_TK = torch.tensor([[0, 6], [6, 6], [2, 0], [6, 6], [6, 2]])
    wanted_TD = slot_by_slot(hidden_TD, ids_TK, weights_TK, weights)
    hidden_TD[1], hidden_TD[3] = torch.nan, torch.inf
    weights_TK[0, 1], weights_TK[1] = torch.nan, torch.inf
    for expert in (1, 3, 4, 5):
        weights.gate_up[expert], weights.down[expert] = torch.nan, torch.inf
    for compute in (experts_cpu, experts_reference):
        found_TD = compute(hidden_TD, ids_TK, weights_TK, weights)
        assert_close(found_TD.double(), wanted_TD, **NEAR)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_used_does_not_hide_that_it_is_not_finite(value: float) -> None:
    weights = random_layer()
    hidden_TD, _, weights_TK = random_call(weights, tokens=3, slots=2)
    ids_TK = torch.tensor([[0, 1], [2, 1], [3, 4]])
    hidden_TD[1, 7] = value
    found_TD = experts_cpu(hidden_TD, ids_TK, weights_TK, weights)
    assert not found_TD[1].isfinite().any()
    assert found_TD[[0, 2]].isfinite().all()


def test_large_values_saturate_as_in_torch() -> None:
    weights = random_layer()
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=8, slots=2)
    call = (hidden_TD * 1000, ids_TK, weights_TK)
    assert_close(
        experts_cpu(*call, weights), experts_reference(*call, weights), rtol=1e-5, atol=0.1
    )


def test_nothing_to_do() -> None:
    weights = random_layer()
    for tokens in (0, 4):
        hidden_TD, ids_TK, weights_TK = random_call(weights, tokens, slots=2, skipped=1.1)
        with count_work() as work:
            found_TD = experts_cpu(hidden_TD, ids_TK, weights_TK, weights)
        assert torch.equal(found_TD, torch.zeros(tokens, weights.hidden))
        assert (work.calls, work.rows, work.distinct) == (1, 0, 0)


@pytest.mark.usefixtures("threads")
def test_work_falls_with_slots_and_experts() -> None:
    weights = random_layer(experts=16)
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=50, slots=4, skipped=0.0)
    fewer_TK = ids_TK.clone()
    fewer_TK[:, 2:] = 16
    for ids in (ids_TK, fewer_TK, ids_TK % 3):
        with count_work() as work:
            experts_cpu(hidden_TD, ids, weights_TK, weights)
        used = ids[ids < 16]
        assert (work.rows, work.distinct) == (used.numel(), used.unique().numel())


@pytest.mark.usefixtures("threads")
def test_same_bits_every_time() -> None:
    weights = random_layer(experts=64)
    for tokens in (3, 40, 400):
        call = random_call(weights, tokens, slots=8)
        first_TD = experts_cpu(*call, weights)
        assert all(torch.equal(experts_cpu(*call, weights), first_TD) for _ in range(20))


def test_inputs_may_be_views_and_of_any_dtype() -> None:
    weights = random_layer()
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=12, slots=3)
    wanted_TD = experts_cpu(hidden_TD, ids_TK, weights_TK, weights)
    hidden, ids, gates = (t.T.contiguous().T for t in (hidden_TD, ids_TK, weights_TK))
    assert not hidden.is_contiguous()
    assert torch.equal(experts_cpu(hidden, ids, gates, weights), wanted_TD)
    assert torch.equal(
        experts_cpu(hidden_TD, ids_TK.int(), weights_TK.double(), weights), wanted_TD
    )
    half_TD = experts_cpu(hidden_TD.bfloat16(), ids_TK, weights_TK, weights)
    assert half_TD.dtype == torch.bfloat16
    assert_close(half_TD.float(), wanted_TD, rtol=0.02, atol=0.02)


def test_bf16_weights_give_what_their_float32_copy_gives() -> None:
    weights = random_layer(dtype=torch.bfloat16)
    copy = ExpertWeights(weights.gate_up.float(), weights.down.float())
    call = random_call(weights, tokens=12, slots=3)
    assert torch.equal(experts_cpu(*call, weights), experts_cpu(*call, copy))


def test_weights_that_change_are_noticed() -> None:
    weights = random_layer()
    call = random_call(weights, tokens=6, slots=2)
    experts_cpu(*call, weights)
    weights.down.mul_(2)
    assert_close(experts_cpu(*call, weights).double(), slot_by_slot(*call, weights), **NEAR)
    same_tensors = ExpertWeights(weights.gate_up, weights.down, is_concatenated=False)
    wanted_TD = slot_by_slot(*call, same_tensors)
    assert_close(experts_cpu(*call, same_tensors).double(), wanted_TD, **NEAR)


def test_runs_in_several_threads_and_in_inference_mode() -> None:
    weights = random_layer(experts=32)
    calls = [random_call(weights, tokens, slots=4) for tokens in (3, 30, 90)]
    wanted = [experts_cpu(*call, weights) for call in calls]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(30):
                if not torch.equal(experts_cpu(*calls[number], weights), wanted[number]):
                    wrong.append(number)

    running = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


def test_what_it_cannot_do_is_refused() -> None:
    weights = random_layer()
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=4, slots=2)
    with pytest.raises(LeanMoeError, match="float64 hidden states"):
        experts_cpu(hidden_TD.double(), ids_TK, weights_TK, weights)
    own = ExpertWeights(weights.gate_up, weights.down, gate=lambda both: both[:, :24])
    with pytest.raises(LeanMoeError, match="function of the model's own"):
        experts_cpu(hidden_TD, ids_TK, weights_TK, own)
    for wrong in (-3, 7):
        ids_TK[3, 1] = wrong
        with pytest.raises(LeanMoeError, match=f"an expert id is {wrong}: it must be 0 to 5, or 6"):
            experts_cpu(hidden_TD, ids_TK, weights_TK, weights)
