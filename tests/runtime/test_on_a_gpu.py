"""A plan on a GPU: the same as Transformers' own experts there, by our kernels."""

from __future__ import annotations

import pytest
import torch

from leanmoe import Plan, Rule, apply
from leanmoe.runtime import has_kernel, shape_of
from tests.runtime.families import build
from tests.runtime.test_apply import ids, logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
FAMILIES = ("deepseek_v3", "qwen3_moe", "olmoe", "mixtral", "gpt_oss")
RULES = (Rule(), Rule(top_k=2, keep_weights=True), Rule(guaranteed=1), Rule(budget=3))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_kernels_give_what_the_stock_experts_give(family: str, rule: Rule) -> None:
    model = build(family).cuda()
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)
    inputs = ids(3, 9).cuda()
    with apply(model, plan):
        wanted = logits(model, input_ids=inputs)
    with apply(model, plan, experts="leanmoe") as applied:
        found = logits(model, input_ids=inputs)
    assert has_kernel(model)
    assert applied.implementation == "leanmoe gpu"
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4)


def test_a_reply_in_bfloat16_is_the_same_each_time() -> None:
    """Prompt, cache and decoding steps of one token, greedy."""
    model = build("qwen3_moe").to(torch.bfloat16).cuda()
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(guaranteed=2))
    with apply(model, plan, experts="leanmoe"):
        prompts = ids(2, 6).cuda()
        replies = [model.generate(prompts, max_new_tokens=8, do_sample=False) for _ in range(2)]
    assert replies[0].shape == (2, 14)
    assert torch.equal(*replies)
