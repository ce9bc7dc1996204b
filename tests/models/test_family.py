"""A family's record: what it says where a config.json says nothing, and what cannot change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from leanmoe.models.attention import attention
from leanmoe.models.families import FAMILIES
from leanmoe.models.family import LOADED_AROUND, WITHOUT_TEXT_CLASS, Family, not_loadable_reason
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


def test_what_loads_as_text_is_what_transformers_maps() -> None:
    assert {name for name in FAMILIES if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} == set(
        WITHOUT_TEXT_CLASS
    )
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= LOADED_AROUND


def test_code_that_comes_with_a_checkpoint_may_load_it() -> None:
    config = {"model_type": "kimi_k2"}
    assert not_loadable_reason(config, "kimi_k2") is not None
    mapped = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    assert not_loadable_reason({**config, **mapped}, "kimi_k2") is None
