"""How a token's slots are weighed, by hand."""

from __future__ import annotations

import pytest
import torch

from leanmoe.models.routers import Router
from leanmoe.routing.gate_weights import WholeTopK, votes, weigh

GATES_TK = torch.tensor([[0.4, 0.2, 0.1]])
TWO_TK = torch.tensor([[True, True, False]])
AFTER = Router("softmax_after_top_k", score_dtype="logits")


@pytest.mark.parametrize(
    ("router", "weights"),
    [
        (Router(), [0.4, 0.2, 0.0]),
        (Router(scaling=2.5), [1.0, 0.5, 0.0]),
        (Router(normalise=True), [2 / 3, 1 / 3, 0.0]),
        (Router(normalise=True, normalise_epsilon=0.2, scaling=2.0), [1.0, 0.5, 0.0]),
    ],
)
def test_kept_slots_are_normalised_and_scaled_as_the_router_says(
    router: Router, weights: list[float]
) -> None:
    torch.testing.assert_close(weigh(GATES_TK, router, TWO_TK), torch.tensor([weights]))


def test_the_whole_top_k_may_divide_the_kept_slots() -> None:
    whole = WholeTopK(GATES_TK, 0.0)
    kept = weigh(GATES_TK, Router(normalise=True), TWO_TK, whole)
    torch.testing.assert_close(kept, torch.tensor([[4 / 7, 2 / 7, 0.0]]))
    after = weigh(GATES_TK, AFTER, TWO_TK, whole)
    torch.testing.assert_close(after, GATES_TK.softmax(-1).masked_fill(~TWO_TK, 0.0))


NORMALISING = pytest.mark.parametrize(
    "router", [Router(normalise=True), AFTER], ids=["before", "after"]
)


@NORMALISING
def test_between_the_two_sums_weights_are_between_in_their_logarithms(router: Router) -> None:
    kept, anew, between = (
        weigh(GATES_TK, router, TWO_TK, whole)[TWO_TK].log()
        for whole in (WholeTopK(GATES_TK, 0.0), None, WholeTopK(GATES_TK, 0.25))
    )
    torch.testing.assert_close(between, 0.25 * anew + 0.75 * kept)


@NORMALISING
def test_a_token_without_slots_weighs_nothing(router: Router) -> None:
    weights = weigh(GATES_TK, router, torch.zeros(1, 3, dtype=torch.bool))
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


def test_votes_are_weights_before_scaling() -> None:
    router = Router(normalise=True, scaling=2.5)
    torch.testing.assert_close(votes(GATES_TK, router) * 2.5, weigh(GATES_TK, router))
