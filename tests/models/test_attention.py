"""What a token leaves in the cache."""

from __future__ import annotations

from leanmoe.models.catalog import published_shape

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
