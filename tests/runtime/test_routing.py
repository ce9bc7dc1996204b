"""Our routing in a router's place: only where it is sure to choose alike, and gone afterwards."""

from __future__ import annotations

import pytest
import torch

from leanmoe import Plan, Rule, apply
from leanmoe.runtime import find_layers, shape_of
from leanmoe.runtime.routing import fast_router
from tests import tiny
from tests.runtime.families import CONFIGS, build
from tests.runtime.test_apply import ids, logits

REPLACED = ("deepseek_v3", "qwen3_moe", "olmoe", "mixtral", "glm4_moe")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stand_in_gives_the_models_own_logits(family: str) -> None:
    """An empty plan on our kernels, where the router is replaced or not."""
    model = build(family)
    stock = logits(model)
    with apply(model, Plan(shape_of(model).fingerprint()), experts="leanmoe"):
        torch.testing.assert_close(logits(model), stock, rtol=2e-4, atol=2e-5)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("family", REPLACED)
def test_it_stands_in_where_it_should(family: str) -> None:
    model = build(family)
    shape = shape_of(model)
    for layer in find_layers(model):
        assert fast_router(layer, shape.router, shape.top_k) is not None
        assert "forward" not in vars(layer.router)


@pytest.mark.parametrize("family", ["lfm2_moe", "minimax_m2", "hy_v3", "afmoe"])
def test_a_router_that_its_block_gives_the_bias_is_left_alone(family: str) -> None:
    model = tiny.build(family)
    stock, shape = logits(model), shape_of(model)
    layer = find_layers(model)[0]
    assert fast_router(layer, shape.router, shape.top_k) is None
    hidden_TD = torch.randn(3, shape.hidden, generator=torch.Generator().manual_seed(0))
    assert layer.logits(hidden_TD, shape.router).shape == (3, shape.experts)
    with apply(model, Plan(shape.fingerprint()), experts="leanmoe"):
        torch.testing.assert_close(logits(model), stock, rtol=2e-4, atol=2e-5)


def test_a_router_that_chooses_otherwise_is_left_alone() -> None:
    model = build("deepseek_v3")
    shape = shape_of(model)
    layer = find_layers(model)[0]
    other = shape.router.__class__(**{**vars(shape.router), "scaling": 7.0})
    assert fast_router(layer, other, shape.top_k) is None
    assert fast_router(layer, shape.router, shape.top_k + 1) is None


@pytest.mark.parametrize(
    "rule", [Rule(top_k=2, renormalise=0.0), Rule(threshold=0.5), Rule(guaranteed=1)], ids=str
)
def test_prompt_and_reply_parts_are_joined_as_by_the_reference(rule: Rule) -> None:
    """Most tokens are prompt: they are routed with the rest and the rest put over them."""
    model = build("deepseek_v3")
    fingerprint = shape_of(model).fingerprint()
    plan = Plan.banded(
        fingerprint, Plan.uniform(fingerprint, rule).bands, (Rule(top_k=1), Rule(top_k=0))
    )
    with apply(model, plan):
        expected = logits(model, input_ids=ids(2, 12), logits_to_keep=2)
    with apply(model, plan, experts="leanmoe"):
        found = logits(model, input_ids=ids(2, 12), logits_to_keep=2)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
