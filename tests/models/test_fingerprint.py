"""Which models are the same one to a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leanmoe.models.fingerprint import Fingerprint

MODEL = Fingerprint("Qwen3_5MoeForConditionalGeneration", 40, 40, 256, 8)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
        ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
        ("Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"),
        ("AriaForConditionalGeneration", "AriaTextForCausalLM"),
        ("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLForCausalLM"),
        ("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
    ],
)
def test_a_language_model_is_the_same_with_and_without_what_is_around_it(
    one: str, other: str
) -> None:
    first, second = (replace(MODEL, architecture=name) for name in (one, other))
    assert first.difference(second) is None
    assert second.difference(first) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen3MoeForCausalLM"),
        ("architecture", "Qwen3VLMoeForConditionalGeneration"),
        ("layers", 41),
        ("experts", 255),
        ("top_k", 4),
    ],
)
def test_another_model_is_named_by_what_differs(field: str, value: object) -> None:
    changes: dict[str, object] = {field: value}
    assert MODEL.difference(replace(MODEL, **changes)) == field  # type: ignore[arg-type]
