"""How far fewer experts move a layer's output on random input: LExI's measure, no data needed."""

from __future__ import annotations

from typing import Any

import torch

from leanmoe.plan import Rule
from leanmoe.routing import route
from leanmoe.runtime import find_layers, shape_of
from leanmoe.runtime.experts import experts_forward
from leanmoe.tune.layer_time import profile_hidden

TOKENS = 512


@torch.inference_mode()
def perturbation(model: Any, tokens: int = TOKENS, seed: int = 0) -> dict[tuple[int, int], float]:
    """Mean Frobenius distance between a layer's output at k and at full k, by (layer, k).

    Inputs are standard normal, as layer inputs are normalised (LExI, arXiv 2509.02753, stage 1).
    """
    shape = shape_of(model)
    moved: dict[tuple[int, int], float] = {}
    draw = torch.Generator().manual_seed(seed)
    for layer in find_layers(model):
        weight = layer.experts.down_proj
        hidden_TD = torch.randn(tokens, profile_hidden(layer), generator=draw).to(weight)
        bias_E = layer.ranking_bias(shape.router)
        logits_TE = hidden_TD.float() @ layer.router.weight.float().T
        outputs = []
        for k in range(1, shape.top_k + 1):
            routing = route(logits_TE, shape.router, shape.top_k, Rule(top_k=k), bias_E)
            outputs.append(
                experts_forward(
                    layer.experts, hidden_TD, routing.ids_STK, routing.weights_STK.to(weight)
                )
            )
        for k, output in enumerate(outputs, start=1):
            moved[layer.number, k] = float((output - outputs[-1]).norm() / tokens**0.5)
    return moved
