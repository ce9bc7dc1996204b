"""Names and weights of a decoder's matrices."""

from __future__ import annotations

from collections import Counter

import pytest

from leanmoe.models.families import FAMILIES
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.modules import modules
from leanmoe.models.shape import read_shape
from tests.published import MODELS


@pytest.mark.parametrize(
    ("model", "projection"),
    [
        ("Qwen/Qwen3-30B-A3B", "model.layers.7.self_attn.k_proj"),
        ("deepseek-ai/DeepSeek-V3", "model.layers.7.self_attn.kv_a_proj_with_mqa"),
        ("mistralai/Mixtral-8x7B-v0.1", "model.layers.7.block_sparse_moe.experts.0.w2"),
    ],
)
def test_matrices_hold_a_models_mixers(model: str, projection: str) -> None:
    config = MODELS[model].config
    shape, family = read_shape(config), FAMILIES[str(config["model_type"])]
    settings = HfConfig(config, family.defaults)
    listed = list(modules(settings, family, shape.moe_layers))
    weights = Counter[str]()
    for module in listed:
        weights[module.part] += module.weights
    assert weights["mixers"] == shape.parameters.mixers
    assert weights["head"] == shape.parameters.embedding
    assert sum(projection in module.names for module in listed) == 1


def test_models_around_a_language_model_have_their_own_prefixes() -> None:
    config = MODELS["Qwen/Qwen3-30B-A3B"].config
    family = FAMILIES["qwen3_moe"]
    names = {n for m in modules(HfConfig(config, family.defaults), family, (0, 1)) for n in m.names}
    assert "model.language_model.layers.1.mlp.experts.0.up_proj" in names
    assert "language_model.model.layers.2.mlp.up_proj" in names
