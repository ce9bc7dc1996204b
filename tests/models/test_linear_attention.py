"""Layers of linear attention cache nothing that grows with the context."""

from __future__ import annotations

from leanmoe.models.shape import read_shape
from tests.published import MODELS


def test_a_hybrid_models_linear_layers_cache_nothing() -> None:
    found = read_shape(MODELS["Qwen/Qwen3-Next-80B-A3B-Instruct"].config)
    assert sum(count for _, count in found.attention) == 12
    nemotron = read_shape(MODELS["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B"].config)
    assert (sum(count for _, count in nemotron.attention), nemotron.matrices) == (6, 2)
