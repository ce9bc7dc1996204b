"""Which experts remain."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.prune.kept_experts import as_plan, best_experts, kept_count, restricted
from tests import tiny


@pytest.fixture(scope="module")
def grouped() -> MoEShape:
    return read_shape(tiny.config("glm4_moe").to_dict())


@pytest.fixture(scope="module")
def plain() -> MoEShape:
    return read_shape(tiny.config("qwen3_moe").to_dict())


@pytest.mark.parametrize(
    ("text", "kept"), [("75%", 12), ("12", 12), ("87.5%", 12), ("100%", 16), ("50%", 8)]
)
def test_shares_and_numbers(grouped: MoEShape, text: str, kept: int) -> None:
    assert kept_count(text, grouped) == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("most", "a share like 75%"),
        ("0%", "it must leave"),
        ("120%", "it must leave"),
        ("-3", "it must leave"),
        ("nan%", "it must leave"),
        ("25%", "leaves 2 in the 2 groups"),
    ],
)
def test_what_cannot_be_kept(grouped: MoEShape, text: str, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        kept_count(text, grouped)


def test_fewer_than_a_token_needs(plain: MoEShape) -> None:
    with pytest.raises(LeanMoeError, match="leaves 3: a token needs 4"):
        kept_count("3", plain)
    assert kept_count("4", plain) == 4


def test_the_best_remain_lower_numbers_among_equals(plain: MoEShape) -> None:
    scores = np.zeros((2, 16))
    scores[1, [9, 11]] = 1.0
    kept = best_experts(scores, 4, plain)
    assert kept == ((0, 1, 2, 3), (0, 1, 9, 11))


def test_as_many_in_each_group(grouped: MoEShape) -> None:
    kept = best_experts(np.arange(16.0)[None], 8, grouped)
    assert kept == ((2, 3, 6, 7, 10, 11, 14, 15),)


def test_protected_experts_remain_or_it_is_said(grouped: MoEShape) -> None:
    kept = best_experts(np.arange(16.0)[None], 8, grouped, [(0, 0)])
    assert kept == ((0, 3, 6, 7, 10, 11, 14, 15),)
    with pytest.raises(LeanMoeError, match="3 protected experts where 2 may remain"):
        best_experts(np.arange(16.0)[None], 8, grouped, [(0, 0), (0, 1), (0, 2)])


def test_as_a_plan(plain: MoEShape) -> None:
    kept = best_experts(np.random.default_rng(0).random((4, 16)), 12, plain)
    plan = as_plan(kept, plain)
    plan.check(plain.fingerprint())
    assert [rule.experts for rule in plan.rules_for(1)] == list(kept)


def test_a_plan_restricted_to_experts_uses_no_others_at_any_load(plain: MoEShape) -> None:
    kept = ((0, 1, 2, 3, 9), (4, 5, 6, 7, 8)) * 2
    rules = (Rule(top_k=3, keep_weights=True), Rule(budget=7, budget_per_rank=6)) * 2
    plan = Plan(plain.fingerprint(), (Band(8, rules),), (Rule(top_k=0), Rule()) * 2)
    found = restricted(plan, kept)
    found.check(plain.fingerprint())
    assert found.rules_for(4)[:2] == (
        Rule(top_k=3, keep_weights=True, experts=kept[0]),
        Rule(budget=5, experts=kept[1], budget_per_rank=5),
    )
    assert found.rules_for(999) == tuple(Rule(experts=experts) for experts in kept)
    assert found.prompt[:2] == (Rule(top_k=0, experts=kept[0]), Rule(experts=kept[1]))


def test_layers_may_keep_different_numbers(grouped: MoEShape) -> None:
    layers = len(grouped.moe_layers)
    scores = np.random.default_rng(0).random((layers, 16))
    counts = [8, 16, 12, 8][:layers]
    kept = best_experts(scores, counts, grouped)
    assert [len(experts) for experts in kept] == counts
