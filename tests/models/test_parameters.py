"""Weights of a model by what they are for; published totals are compared in test_shape.py."""

from __future__ import annotations

from leanmoe.models.families import FAMILIES
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.parameters import count_parameters, layer_count
from leanmoe.models.shape import read_shape
from tests.published import MODELS


def test_parts_add_up_to_the_whole_model() -> None:
    shape = read_shape(MODELS["deepseek-ai/DeepSeek-V3"].config)
    parts = shape.parameters
    routed = len(shape.moe_layers) * shape.experts * parts.expert
    assert parts.always + routed == shape.total_parameters()


def test_layers_that_look_experts_up_have_no_ranking_bias() -> None:
    config = MODELS["deepseek-ai/DeepSeek-V3"].config
    family = FAMILIES["deepseek_v3"]
    settings = HfConfig(config, family.defaults)
    ranked = count_parameters(settings, family, tuple(range(61)), ())
    looked_up = count_parameters(settings, family, tuple(range(61)), (0, 1, 2))
    assert ranked.routers - looked_up.routers == 3 * 256


def test_a_layer_that_is_one_block_is_listed_as_one() -> None:
    family = FAMILIES["nemotron_h"]
    kinds = {"layer_types": ["linear_attention", "moe", "full_attention"], "num_hidden_layers": 9}
    assert layer_count(HfConfig(kinds), family) == 3
    assert layer_count(HfConfig(kinds), FAMILIES["qwen3_moe"]) == 9
