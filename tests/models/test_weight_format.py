"""Bytes of stored weights, by how a config says they are quantised."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.models.shape import read_shape
from tests.published import MODELS

QWEN3 = MODELS["Qwen/Qwen3-30B-A3B"].config


def test_gpt_oss_stores_experts_alone_in_four_bits() -> None:
    shape = read_shape(MODELS["openai/gpt-oss-120b"].config)
    assert shape.weight_bytes == pytest.approx(4.25 / 8)
    assert shape.storage.other_bytes == 2.0
    assert shape.decode_bytes(128) == pytest.approx(65.2e9, rel=0.05)  # the checkpoint's size


@pytest.mark.parametrize(
    ("quantisation", "name", "stored", "other"),
    [
        (None, "bfloat16", 2.0, 2.0),
        ({"quant_method": "fp8"}, "fp8", 1.0, 1.0),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4", 0.515625, 0.515625),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, "int4", 0.5, 0.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 1.0, 1.0),
        (
            {
                "quant_method": "compressed-tensors",
                "ignore": ["re:.*self_attn.*", "lm_head"],
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
            },
            "int4",
            0.5625,
            2.0,
        ),
        ({"quant_method": "new"}, "bfloat16 (as if: new is not known)", 2.0, 2.0),
    ],
)
def test_bytes_of_stored_weights(quantisation: Any, name: str, stored: float, other: float) -> None:
    shape = read_shape({**QWEN3, "quantization_config": quantisation})
    assert shape.storage.name == name
    assert shape.storage.expert_bytes == stored
    assert shape.storage.other_bytes == other
