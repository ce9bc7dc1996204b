"""The experiment's gate routes as DeepSeek-V3's, or as the rule says it, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.renormalise.gate import install, projections
from leanmoe.plan import Rule
from leanmoe.routing import route
from reference_model.architecture import DeepseekV3Settings, build, correction_bias, routers
from tests.reference_model.conftest import TINY_DEEPSEEK

SIZES = replace(TINY_DEEPSEEK, groups=1, groups_used=1)
IDS_SN = torch.arange(4 * 8).reshape(4, 8) % SIZES.vocab_size


def drawn(sizes: DeepseekV3Settings = SIZES) -> Any:
    model = build(sizes, seed=0)
    for gate in routers(model):
        torch.nn.init.normal_(gate.weight)  # type: ignore[arg-type]
    return model.eval()


@torch.no_grad()
def test_the_sigmoid_gate_is_deepseeks() -> None:
    model = drawn()
    stock = model(IDS_SN).logits
    install(model, "sigmoid", 8)
    torch.testing.assert_close(model(IDS_SN).logits, stock)


@torch.no_grad()
def test_tokens_at_one_position_share_experts() -> None:
    model = drawn()
    routed = install(model, "softmax", 8)
    routed.rule, routed.decode_batch = Rule(guaranteed=1, renormalise=0.5), 4
    (gate,) = routers(model)
    hidden_SND = torch.randn(4, 8, SIZES.hidden)
    logits_TE, weights_TK, ids_TK = gate(hidden_SND)
    step_TE = logits_TE.view(4, 8, -1)[:, 3]
    bias_E = correction_bias(gate)
    wanted = route(step_TE, routed.router, SIZES.top_k, routed.rule, bias_E)
    weights = weights_TK.view(4, 8, -1)[:, 3]
    torch.testing.assert_close(weights, wanted.weights_BTK)
    used = weights > 0
    assert torch.equal(ids_TK.view(4, 8, -1)[:, 3][used], wanted.ids_BTK[used])


def test_all_experts_project_onto_themselves() -> None:
    model = drawn(replace(SIZES, shared_experts=0))
    routed = install(model, "softmax", 8)
    (found,) = projections(model, IDS_SN, routed, SIZES.top_k - 1)
    assert -2 < found < 2
