"""Gates, ranking, group limits, remaining experts and the check of logits, by hand and by loops."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import Router
from leanmoe.routing import check_logits, score
from leanmoe.routing.scores import is_usable, order_keys, put_first
from tests.conformance.cases import ROUTERS

NEVER = float("-inf")
FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from((0.0, -0.0, 1.0))


def test_bias_ranks_and_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    scores = score(logits, ROUTERS["sigmoid with a bias"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(scores.gates_BTE, torch.tensor([[0.5, 0.75]]))
    torch.testing.assert_close(scores.ranking_BTE, torch.tensor([[1.5, 0.75]]))


def test_softmax_gates_add_up_to_one_and_logits_rank_where_softmax_comes_after() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(score(logits, Router()).gates_BTE, torch.tensor([[0.25, 0.75]]))
    assert score(logits, ROUTERS["softmax after top-k"]).ranking_BTE is logits


def test_experts_that_do_not_remain_never_rank() -> None:
    ranking = score(torch.zeros(2, 4), Router(), experts=(1, 3)).ranking_BTE
    assert ranking.tolist() == [[NEVER, 0.5, NEVER, 0.5]] * 2


def test_a_pruned_softmax_is_that_of_the_model_without_the_others() -> None:
    logits = torch.randn(5, 12)
    kept = (0, 3, 4, 9, 11)
    gates = score(logits, Router(), experts=kept).gates_BTE
    assert torch.equal(gates[:, list(kept)], score(logits[:, list(kept)], Router()).gates_BTE)
    assert bool((gates.sum(dim=-1) - 1).abs().max() < 1e-6)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("experts", [None, tuple(range(2, 16)), (0, 5, 6, 7, 9, 14)])
def test_group_limits_are_those_of_a_loop(
    group_score: Literal["max", "top2_sum"], experts: tuple[int, ...] | None
) -> None:
    router = replace(ROUTERS["V3 groups"], group_score=group_score)
    logits = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-2, 2, 16)
    found = score(logits, router, bias, experts).ranking_BTE
    for row, ranking in zip(logits.sigmoid() + bias, found, strict=True):
        remain = range(16) if experts is None else experts
        groups = [[e for e in remain if e // 4 == group] for group in range(4)]
        best = [sorted((float(row[e]) for e in group), reverse=True) for group in groups]
        top = 1 if group_score == "max" else 2
        value = [sum(scores[:top]) if scores else NEVER for scores in best]
        used = sorted(range(4), key=value.__getitem__, reverse=True)[:2]
        expected = [float(row[e]) if e in remain and e // 4 in used else NEVER for e in range(16)]
        assert ranking.tolist() == pytest.approx(expected)


def test_scores_are_computed_in_the_familys_dtype() -> None:
    logits = torch.zeros(1, 4, dtype=torch.bfloat16)
    assert score(logits, Router("sigmoid")).gates_BTE.dtype == torch.float32
    assert score(logits, Router(score_dtype="logits")).gates_BTE.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_by_name(value: float) -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 0] = value
    with pytest.raises(LeanMoeError, match=r"layers\.3: router logits are not finite"):
        check_logits(logits, "layers.3")
    padding = torch.zeros(2, 3, dtype=torch.bool)
    padding[1, 2] = True
    check_logits(logits, "layers.3", padding)


def test_a_router_may_rule_an_expert_out_but_not_all() -> None:
    check_logits(torch.tensor([[NEVER, 0.0]]), "layer")
    with pytest.raises(LeanMoeError, match="not finite"):
        check_logits(torch.tensor([[NEVER, NEVER]]), "layer")


@given(st.lists(FLOATS, min_size=1, max_size=12))
@settings(deadline=None)
def test_keys_order_as_floats_do_and_ties_by_lower_id(values: list[float]) -> None:
    values = [struct.unpack("f", struct.pack("f", value))[0] for value in values]
    keys = order_keys(torch.tensor([values]))
    expected = sorted(range(len(values)), key=lambda e: (-values[e], e))
    assert keys[0].argsort(descending=True).tolist() == expected
    assert len(set(keys[0].tolist())) == len(values)
    usable = is_usable(keys, len(values))[0].tolist()
    assert usable == [value > float("-inf") for value in values]


def test_chosen_slots_come_first_in_their_own_order() -> None:
    keys = order_keys(torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]))
    ids, chosen = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
    assert put_first(keys, ids, chosen)[0].argsort(descending=True).tolist() == [1, 2, 0, 3, 4]
