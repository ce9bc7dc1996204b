"""The model's work counted, and its weights in bf16."""

from __future__ import annotations

from dataclasses import replace

import torch

from reference_model.architecture import build, correction_bias, count_flops, routers, to_bf16
from tests.reference_model.conftest import TINY, TINY_SOFTMAX


def test_flops_by_hand() -> None:
    flops = count_flops(TINY.model)
    attention = 32 * 2 * 16 + 32 * 24 + 16 * 2 * 24 + 2 * 16 * 32
    dense = 3 * 32 * 48
    moe = 3 * 32 * 16 * 5 + 32 * 16
    assert flops.matrices == 6 * (2 * attention + dense + moe + 32 * 64)
    assert flops.attention == 2 * 3 * 2 * 2 * (16 + 16) * 16


def test_flops_of_grouped_queries_by_hand() -> None:
    flops = count_flops(TINY_SOFTMAX.model)
    attention = 32 * 2 * 16 + 2 * 32 * 16 + 2 * 16 * 32
    moe = 3 * 32 * 16 * 4 + 32 * 16
    assert flops.matrices == 6 * (2 * (attention + moe) + 32 * 64)
    assert flops.attention == 2 * 3 * 2 * 2 * (16 + 16) * 16


def test_every_weight_that_a_token_meets_is_counted() -> None:
    for settings in (TINY.model, TINY_SOFTMAX.model):
        model = build(replace(settings, top_k=settings.experts), seed=0)
        matrices = [p for name, p in model.named_parameters() if "norm" not in name]
        embedding = settings.vocab_size * settings.hidden
        held = sum(p.numel() for p in matrices) - embedding
        assert replace(settings, top_k=settings.experts).weights_met == held


def test_bf16_leaves_the_routers_biases_in_float32() -> None:
    model = build(TINY.model, seed=0)
    to_bf16(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {correction_bias(gate).dtype for gate in routers(model)} == {torch.float32}
