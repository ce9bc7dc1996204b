"""What a token leaves in the cache."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from leanmoe.models.attention import attention_of, has_window
from leanmoe.models.catalog import published_shape
from leanmoe.models.families import FAMILIES
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.shape import read_shape
from tests.published import MODELS

V3 = published_shape("deepseek-ai/DeepSeek-V3")


QWEN = published_shape("Qwen/Qwen3-30B-A3B")


def test_what_a_token_leaves_in_the_cache() -> None:
    assert V3.cached_bytes(1) == 61 * (512 + 64) * 2
    assert V3.cached_bytes(100, tensor=8) == 100 * V3.cached_bytes(1)  # a latent is on every GPU
    assert QWEN.cached_bytes(1) == 48 * 2 * 4 * 128 * 2
    assert QWEN.cached_bytes(1, tensor=4) == QWEN.cached_bytes(1) / 4
    oss = published_shape("openai/gpt-oss-120b")
    assert {kind.window for kind, _ in oss.attention} == {128, None}
    assert oss.cached_bytes(1000) < 1000 * oss.cached_bytes(1)


def test_compressed_tokens_are_cached_as_the_values_they_are() -> None:
    """DeepSeek-V4: a window of 128 in each layer, and one value for 4 or for 128 tokens before."""
    shape = read_shape(MODELS["deepseek-ai/DeepSeek-V4-Flash"].config)
    values = 43 * 128 + 21 * 1000 / 4 + 20 * 1000 / 128
    assert shape.cached_bytes(1128) == pytest.approx(values * 512 * 2)


def test_a_layer_may_have_two_attention_blocks() -> None:
    shape = read_shape(MODELS["meituan-longcat/LongCat-Flash-Chat"].config)
    assert shape.cached_bytes(1) == 2 * 28 * (512 + 64) * 2


def _windows(model_type: str, layers: int, **settings: Any) -> list[bool]:
    defaults = FAMILIES[model_type].defaults
    values = {"model_type": model_type, "num_hidden_layers": layers, **settings}
    return [has_window(HfConfig(values, defaults), layer) for layer in range(layers)]


@pytest.mark.parametrize(
    "model_type",
    [
        "afmoe", "beam", "cohere2_moe", "exaone_moe", "flint", "gemma4_text", "gpt_oss",
        "granitemoe_swa", "laguna", "mellum", "mimo_v2_flash", "qwen2_moe",
    ],
)  # fmt: skip
def test_layers_with_a_window_are_those_that_transformers_assumes(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](num_hidden_layers=14)
    assert _windows(model_type, 14) == [kind == "sliding_attention" for kind in config.layer_types]


@pytest.mark.parametrize(
    ("model_type", "settings", "windows"),
    [
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1, 1, 0]}, [0, 1, 1, 0]),
        ("exaone_moe", {"sliding_window_pattern": "LLG"}, [1, 1, 0, 1]),
        ("exaone_moe", {"sliding_window_pattern": None}, [0, 0, 0, 0]),
        ("afmoe", {"global_attn_every_n_layers": 2}, [1, 0, 1, 0]),
        ("cohere2_moe", {"first_k_dense_replace": 1, "sliding_window_pattern": 2}, [0, 1, 0, 1]),
        ("dots1", {"max_window_layers": 3}, [0, 0, 0, 1]),
        ("qwen3_moe", {"use_sliding_window": True}, [1, 1, 1, 1]),
        ("qwen3_moe", {}, [0, 0, 0, 0]),
        ("mixtral", {}, [1, 1, 1, 1]),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, [0, 1, 0, 1]),
    ],
)
def test_a_config_says_which_layers_have_a_window(
    model_type: str, settings: Any, windows: list[int]
) -> None:
    assert _windows(model_type, 4, **settings) == [bool(each) for each in windows]


def test_window_layers_may_have_heads_of_their_own() -> None:
    settings = HfConfig(
        {
            "model_type": "mimo_v2_flash", "num_hidden_layers": 2, "hidden_size": 4096,
            "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
            "sliding_window": 128, "hybrid_layer_pattern": [0, 1], "swa_num_key_value_heads": 8,
        }
    )  # fmt: skip
    full, near = (attention_of(settings, layer) for layer in (0, 1))
    assert (full.pairs, full.window) == (4, None)
    assert (near.pairs, near.window) == (8, 128)
    assert near.reach(32768) == 128
