"""A family's record: what it says where a config.json says nothing, and what cannot change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from leanmoe.core.errors import LeanMoeError
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


PART = {**MODELS["Qwen/Qwen3-30B-A3B"].config, "architectures": ["Qwen3MoeForCausalLM"]}


@pytest.mark.parametrize(
    ("outer", "part", "inner"),
    [
        ("qwen3_vl_moe", "text_config", "qwen3_vl_moe_text"),
        ("glm4v_moe", "text_config", "qwen3_moe"),
        ("kimi_vl", "text_config", "qwen3_moe"),
        ("internvl_chat", "llm_config", "qwen3_moe"),
        ("interns1", "text_config", "qwen3_moe"),
        ("deepseek_vl_v2", "language_config", "qwen3_moe"),
        ("mistral3", "text_config", "mistral4"),
    ],
)
def test_a_wrapper_that_no_class_loads_is_named(outer: str, part: str, inner: str) -> None:
    reason = not_loadable_reason({"model_type": outer, part: {"model_type": inner}}, inner)
    assert reason == f"Transformers has no class that loads {outer} as a language model"
    if inner != "mistral4":
        wrapper = {"model_type": outer, part: {**PART, "model_type": inner}}
        assert read_shape(wrapper).not_loadable == reason


@pytest.mark.parametrize("outer", ["gemma4", "qwen3_5_moe"])
def test_a_wrapper_that_transformers_loads_as_text_is_not(outer: str) -> None:
    inner = f"{outer}_text"
    wrapper = {"model_type": outer, "text_config": {"model_type": inner}}
    assert not_loadable_reason(wrapper, inner) is None


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64]},
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
        {"model_type": "muse_spark", "text_config": {"model_type": "muse_spark_text"}},
    ],
)
def test_a_wrapper_around_what_no_plan_can_run_on_says_why(config: Any) -> None:
    with pytest.raises(LeanMoeError, match="no plan can run on "):
        read_shape(config)
