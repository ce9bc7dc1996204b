"""Bytes of stored weights of each part, by how a config says they are quantised."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.models.shape import MoEShape, read_shape
from tests.published import MODELS

QWEN3 = MODELS["Qwen/Qwen3-30B-A3B"].config
LAYERS = range(48)


def _read(quantisation: Any, **changes: Any) -> MoEShape:
    return read_shape({**QWEN3, "quantization_config": quantisation, **changes})


def test_gpt_oss_stores_experts_alone_in_four_bits() -> None:
    shape = read_shape(MODELS["openai/gpt-oss-120b"].config)
    assert shape.storage.expert_bytes == pytest.approx(4.25 / 8)
    assert shape.storage.mixer_bytes == 2.0
    assert shape.decode_bytes(128) == pytest.approx(65.2e9, rel=0.05)  # the checkpoint's size


@pytest.mark.parametrize(
    ("quantisation", "name", "stored", "other"),
    [
        (None, "bfloat16", 2.0, 2.0),
        ({"quant_method": "fp8"}, "fp8", 1.0, 1.0),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4", 0.515625, 0.515625),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, "int4", 0.5, 0.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 1.0, 1.0),
    ],
)
def test_one_format_for_all_matrices(
    quantisation: Any, name: str, stored: float, other: float
) -> None:
    shape = _read(quantisation)
    assert (shape.storage.name, shape.storage.unknown) == (name, None)
    assert shape.storage.expert_bytes == stored
    assert shape.storage.mixer_bytes == pytest.approx(other, rel=1e-4)  # norms stay as they are
    assert shape.storage.head_bytes == shape.storage.plain_bytes == 2.0


def test_parts_are_read_at_their_own_bytes() -> None:
    names = ["lm_head"]
    for n in LAYERS:
        names += [f"model.layers.{n}.mlp.gate", f"model.layers.{n}.post_attention_layernorm"]
    shape = _read({"quant_method": "fp8", "modules_to_not_convert": names})
    # A norm's name says nothing of attention: 48 layers of 18.9 million weights, a byte each.
    assert shape.always_bytes() == pytest.approx(1.554e9, rel=0.001)


def test_formats_that_differ_by_layer_are_counted_layer_by_layer() -> None:
    names = [f"model.layers.{n}.mlp.experts" for n in range(12)]
    shape = _read({"quant_method": "fp8", "modules_to_not_convert": names})
    assert shape.storage.name == "fp8 and bfloat16"
    assert shape.storage.expert_bytes == pytest.approx((12 * 2 + 36) / 48)


def test_what_is_not_understood_is_never_taken_for_the_dtype() -> None:
    for quantisation in ({"quant_method": "new"}, {"config": 1}):
        storage = _read(quantisation).storage
        assert storage.name == "not known"
        assert "quant_method" in str(storage.unknown)
    assert "float6" in str(_read(None, dtype="float6", torch_dtype="float6").storage.unknown)


def test_settings_of_the_language_models_part_count() -> None:
    inner = {**QWEN3, "quantization_config": {"quant_method": "fp8"}}
    shape = read_shape({"model_type": "wrapper", "quantization_config": None, "text_config": inner})
    assert shape.storage.name == "fp8"
