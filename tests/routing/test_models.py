"""route() against Transformers' own routers with fewer experts per token in their settings."""

from __future__ import annotations

import pytest
import torch

from leanmoe.plan import Rule
from leanmoe.routing import route
from leanmoe.runtime import shape_of
from tests import tiny
from tests.models.test_families import routed

NAMED = [
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "lfm2_moe",
    "minimax",
    "mistral4",
    "mixtral",
    "olmoe",
    "qwen3_moe",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_uniform_top_k_is_the_family_with_that_k_bit_for_bit(
    family: str, top_k: int, dtype: torch.dtype
) -> None:
    model = tiny.build(family, dtype)
    shape = shape_of(model)
    for module in model.modules():
        if getattr(module, "top_k", None) == shape.top_k:
            module.top_k = top_k
    for layer, logits_TE, ids_TK, weights_TK in routed(model, dtype):
        assert ids_TK.shape[-1] == top_k
        bias_E = layer.ranking_bias(shape.router)
        found = route(logits_TE, shape.router, shape.top_k, Rule(top_k), bias_E)
        assert torch.equal(found.ids_BTK, ids_TK)
        assert torch.equal(found.weights_BTK.to(weights_TK.dtype), weights_TK)

        padding_T = torch.arange(len(logits_TE)) % 3 == 0
        padded = route(logits_TE, shape.router, shape.top_k, Rule(top_k), bias_E, padding_T)
        assert torch.equal(padded.ids_BTK[~padding_T], ids_TK[~padding_T])
        assert torch.equal(padded.weights_BTK[~padding_T], found.weights_BTK[~padding_T])
