"""What a token leaves in the cache."""

from __future__ import annotations

import pytest

from leanmoe.models.catalog import published_shape
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
