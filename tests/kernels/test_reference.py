"""The torch reference against the definition, slot by slot in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, Gate, count_work, experts_reference
from tests.kernels.layers import in_float64, random_call, random_layer, slot_by_slot

LAYOUTS = [
    {},
    {"transposed": True},
    {"concatenated": False},
    {"biased": True},
    {"transposed": True, "concatenated": False, "biased": True, "gate": Gate.gpt_oss(0.5)},
    {"gated": False, "gate": Gate("relu2")},
    {"gate": Gate("gelu")},
    {"gate": Gate("gelu_tanh")},
    {"gate": Gate("relu")},
    {"gate": Gate(limit=0.3)},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_is_the_definition(layout: dict[str, object]) -> None:
    weights = in_float64(random_layer(**layout))  # type: ignore[arg-type]
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=17, slots=3)
    found_TD = experts_reference(hidden_TD.double(), ids_TK, weights_TK.double(), weights)
    assert_close(found_TD, slot_by_slot(hidden_TD, ids_TK, weights_TK, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_dtype_of_the_hidden_states(dtype: torch.dtype) -> None:
    weights = random_layer(dtype=dtype)
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=9, slots=3)
    found_TD = experts_reference(hidden_TD.to(dtype), ids_TK, weights_TK, weights)
    assert found_TD.dtype == dtype
    wanted_TD = slot_by_slot(hidden_TD.to(dtype), ids_TK, weights_TK, weights)
    assert_close(found_TD.double(), wanted_TD, rtol=0.02, atol=0.03)


def test_functions_of_the_models_own() -> None:
    plain = random_layer()
    own = ExpertWeights(
        plain.gate_up,
        plain.down,
        gate=lambda both: both[:, : plain.width] * 2,
        after=lambda rows: rows + 1,
    )
    hidden_TD, _, _ = random_call(plain, tokens=1, slots=1)
    ids_TK, weights_TK = torch.tensor([[2]]), torch.tensor([[0.5]])
    narrow = 2 * (plain.gate_up[2] @ hidden_TD[0])[: plain.width]
    wanted_D = 0.5 * (plain.down[2] @ narrow + 1)
    assert_close(experts_reference(hidden_TD, ids_TK, weights_TK, own)[0], wanted_D)


def test_counts_rows_and_experts() -> None:
    weights = random_layer()
    hidden_TD, _, weights_TK = random_call(weights, tokens=3, slots=2)
    ids_TK = torch.tensor([[0, 6], [5, 0], [6, 6]])
    with count_work() as work:
        experts_reference(hidden_TD, ids_TK, weights_TK, weights)
    experts_reference(hidden_TD, ids_TK, weights_TK, weights)
    assert (work.calls, work.rows, work.distinct) == (1, 3, 2)


def test_shapes_and_ids_that_do_not_fit_are_named() -> None:
    weights = random_layer()
    hidden_TD, ids_TK, weights_TK = random_call(weights, tokens=4, slots=2)
    with pytest.raises(LeanMoeError, match=r"hidden states of shape \(4, 39\)"):
        experts_reference(hidden_TD[:, :-1], ids_TK, weights_TK, weights)
    with pytest.raises(LeanMoeError, match=r"ids of shape \(3, 2\)"):
        experts_reference(hidden_TD, ids_TK[1:], weights_TK, weights)
    with pytest.raises(LeanMoeError, match=r"routing weights of shape \(4, 1\)"):
        experts_reference(hidden_TD, ids_TK, weights_TK[:, :1], weights)
    for wrong in (-1, 7):
        ids_TK[0, 0] = wrong
        with pytest.raises(LeanMoeError, match=f"an expert id is {wrong}: it must be 0 to 5, or 6"):
            experts_reference(hidden_TD, ids_TK, weights_TK, weights)
