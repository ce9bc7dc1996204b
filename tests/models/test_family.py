"""A family's record: what it says where a config.json says nothing, and what cannot change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from leanmoe.models.attention import attention
from leanmoe.models.families import FAMILIES
from leanmoe.models.family import Family
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.routers import SOFTMAX
from leanmoe.models.shape import read_shape
from tests.published import MODELS

SIZES = HfConfig({"hidden_size": 32, "num_attention_heads": 4, "norm_topk_prob": True})


def test_a_plain_family_has_a_gated_expert_two_norms_and_can_run() -> None:
    family = Family(SOFTMAX, attention(bias=False))
    assert (family.matrices, family.layer_norms, family.shared_width) == (3, 2, None)
    assert family.not_runnable is None
    assert family.router(SIZES).normalise
    assert family.mixer(SIZES, 0) == 4 * 32 * 32


def test_the_table_cannot_be_changed_by_who_reads_it() -> None:
    family = FAMILIES["deepseek_v4"]
    with pytest.raises(FrozenInstanceError):
        family.layer_norms = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        family.defaults["num_hash_layers"] = 0  # type: ignore[index]


def test_weights_that_stand_in_no_layer_are_counted_with_the_norms() -> None:
    config = MODELS["deepseek-ai/DeepSeek-V4-Flash"].config
    shape = read_shape(config)
    further = FAMILIES["deepseek_v4"].further
    assert further is not None
    norms = (2 * shape.layers + 1) * shape.hidden
    assert shape.parameters.norms == norms + further(HfConfig(config))
