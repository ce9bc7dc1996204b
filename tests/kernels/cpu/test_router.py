"""route_cpu beyond tests/conformance: many tokens, and what it cannot route."""

from __future__ import annotations

import torch

from leanmoe.kernels.cpu.router import route_cpu, route_cpu_unsupported
from leanmoe.plan import Rule
from tests.conformance.cases import ROUTERS


def test_many_tokens_are_those_of_few() -> None:
    """More threads do not change what a token gets."""
    logits = torch.randn(700, 64)
    router, bias = ROUTERS["V3 groups"], torch.randn(64) * 0.1
    whole = route_cpu(logits, router, 8, Rule(top_k=5), bias)
    parts = [route_cpu(part, router, 8, Rule(top_k=5), bias) for part in logits.split(30)]
    assert whole.ids_BTK.tolist() == torch.cat([p.ids_BTK for p in parts]).tolist()
    assert torch.equal(whole.weights_BTK, torch.cat([p.weights_BTK for p in parts]))


def test_says_what_it_cannot_do() -> None:
    after = ROUTERS["softmax after top-k"]
    assert route_cpu_unsupported(torch.randn(2, 8).bfloat16(), after, Rule(top_k=1)) is not None
    assert route_cpu_unsupported(torch.randn(2, 8), after, Rule(top_k=0)) is not None
    for rule, reason in ((Rule(budget_per_rank=2), "budget_per_rank"), (Rule(budget=2), "None")):
        assert reason in str(route_cpu_unsupported(torch.randn(2, 8), ROUTERS["softmax"], rule))
