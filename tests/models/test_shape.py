"""Shapes from config.json alone: published sizes, distinct experts, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import Fingerprint, distinct_grouped, distinct_uniform, read_shape
from tests.published import MODELS
from tests.published_bytes import CHECKPOINTS, STORED, predicts_ahead

DEEPSEEK = MODELS["deepseek-ai/DeepSeek-V3"].config


QWEN3 = MODELS["Qwen/Qwen3-30B-A3B"].config


def test_deepseek_v3() -> None:
    shape = read_shape(DEEPSEEK)
    assert shape.expert_width == 2048  # not the dense layers' 18432
    assert shape.dense_width == 18432
    assert shape.moe_layers == tuple(range(3, 61))
    assert (shape.experts, shape.top_k, shape.shared_experts) == (256, 8, 1)
    assert (shape.router.groups, shape.router.groups_used) == (8, 4)
    assert shape.router.scoring == "sigmoid"
    assert shape.expert_parameters == 3 * 7168 * 2048
    assert shape.expert_bytes == shape.expert_parameters * (1 + 4 / 128**2)  # fp8, block scales
    assert shape.fingerprint().moe_layers == 58
    assert shape.fingerprint().architecture == "DeepseekV3ForCausalLM"


def test_layers_that_transformers_5_17_writes_beside_longcats_own_do_not_count() -> None:
    config = MODELS["meituan-longcat/LongCat-Flash-Chat"].config
    assert read_shape({**config, "num_hidden_layers": 56}) == read_shape(config)
    assert read_shape(config).layers == 28


def test_decode_bytes_grow_with_distinct_experts_and_leave_out_the_embedding() -> None:
    shape = read_shape(QWEN3)
    every = shape.decode_bytes(shape.experts)
    assert every == 2 * (shape.total_parameters() - shape.parameters.embedding)
    assert every - shape.decode_bytes(shape.experts - 1) == 48 * shape.expert_bytes
    tied = read_shape({**QWEN3, "tie_word_embeddings": True})
    assert tied.decode_bytes(1) == shape.decode_bytes(1)  # the table is read as the head


@pytest.mark.parametrize("name", STORED)
def test_bytes_are_those_of_the_published_checkpoint(name: str) -> None:
    shape, stored = read_shape(CHECKPOINTS[name].config), STORED[name]
    size = shape.total_bytes() + stored.beside
    if stored.copies is not None:
        size += predicts_ahead(shape, stored.copies)
    assert size == pytest.approx(stored.size, rel=0.01)


def test_forty_checkpoints_have_published_parameters_and_bytes() -> None:
    assert sum(CHECKPOINTS[name].active is not None for name in STORED) >= 40


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4)),
        ({"mlp_layer_types": ["dense", "sparse"] * 3}, (1, 3, 5)),
        ({"moe_layer_freq": [0, 1, 1, 0, 0, 1]}, (1, 2, 5)),
        ({"first_k_dense_replace": 4}, (4, 5)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, (1, 2, 3)),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    assert read_shape({**QWEN3, "num_hidden_layers": 6, **changes}).moe_layers == moe_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing: it must be a whole number, 1 or more"),
        ({"hidden_size": "2048"}, "hidden_size is '2048': it must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1: it must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"moe_intermediate_size": 0.5}, r"moe_intermediate_size is 0\.5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0: it must be a whole number, 1"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129: it must be at most 128"),
        ({"num_experts_per_tok": None}, r"num_experts_per_tok \(or .*\) is missing"),
        ({"num_experts": 0}, "num_experts 0 is not a mixture-of-experts model"),
        ({"num_experts": None}, "num_experts None is not a mixture-of-experts model"),
        ({"num_experts_per_tok": [8, 4]}, "differs from layer to layer"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* one for each of 2 layers"),
        ({"moe_layers_enum": "3,x"}, "moe_layers_enum is '3,x': it must be layer numbers"),
        ({"num_experts": [8, 9]}, r"num_experts differs from layer to layer \(8, 9, "),
        ({"mlp_only_layers": "none"}, "mlp_only_layers is 'none': it must be a list"),
        ({"mlp_only_layers": list(range(48))}, "no decoder layer has routed experts"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types is .* one for each of 48 layers"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': it must be true or false"),
        ({"model_type": "llama"}, "mixture-of-experts model_type 'llama' is not known"),
        ({"model_type": "llama", "num_experts": None}, "'llama' has no routed experts"),
        ({"model_type": ["x"]}, r"model_type is \['x'\]: it must be a word"),
        ({"model_type": ["x"] * 999}, r"model_type is \['x', .{60,120}\.\.\.: it must be a word"),
        ({"quantization_config": 4}, "quantization_config is 4: it must be an object"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: .* at most 10,000"),
        ({"hidden_size": 10**400}, r"hidden_size is 10+\.\.\.: it must be .* at most 1,000,000,0"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers is -1: .* each from 0 to"),
        ({"tie_word_embeddings": "x" * 5000}, r"is 'x{100,119}\.\.\.: it must be true or false"),
        ({"model_type": "x" * 5000}, r"model_type 'x{100,499}\.\.\.x+' is not known"),
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        read_shape({**QWEN3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 7}, "4 of 7 groups .* of 256 experts is not possible"),
        ({"topk_group": 9}, "9 of 8 groups"),
        ({"num_experts_per_tok": 40, "topk_group": 1}, "it must be at most 32, the experts of 1"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0: it must be a number above 0"),
        ({"topk_method": "noaux_tc", "model_type": "deepseek_v2"}, "topk_method is 'noaux_tc'"),
    ],
)
def test_impossible_routing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        read_shape({**DEEPSEEK, **changes})


def test_the_reference_model_is_read_by_name() -> None:
    shape = read_shape("reference")
    assert shape.model_type == "deepseek_v3"
    assert (shape.experts, shape.top_k) == (64, 8)
    assert (shape.router.groups, shape.router.groups_used) == (8, 4)


def choose_grouped(
    random: np.random.Generator, tokens: int, experts: int, top_k: int, groups: int, used: int
) -> np.ndarray:
    """Experts [T,K] of tokens that pick groups, then experts of those groups, all alike."""
    size = experts // groups
    chosen = []
    for _ in range(tokens):
        allowed = random.permutation(groups)[:used]
        reachable = (allowed[:, None] * size + np.arange(size)).ravel()
        chosen.append(random.permutation(reachable)[:top_k])
    return np.stack(chosen)


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize(("groups", "used"), [(1, 1), (8, 4), (8, 2)])
def test_distinct_experts_against_simulation(tokens: int, groups: int, used: int) -> None:
    """Group limits alone leave the uniform formula exact: a token's chances stay k/E."""
    random = np.random.default_rng(0)
    steps = 1500
    counts = [
        len(np.unique(choose_grouped(random, tokens, 64, 8, groups, used))) for _ in range(steps)
    ]
    error = np.std(counts) / np.sqrt(steps)
    assert np.mean(counts) == pytest.approx(distinct_uniform(64, 8, tokens), abs=4 * error + 1e-9)


def test_distinct_experts_when_tokens_agree_on_groups() -> None:
    random = np.random.default_rng(0)
    counts = []
    for _ in range(1500):
        tokens = [random.permutation(32)[:8] for _ in range(8)]  # 4 of 8 groups of 64 experts
        counts.append(len(np.unique(tokens)))
    assert np.mean(counts) == pytest.approx(distinct_grouped(64, 8, 8, 8, 4), rel=0.01)


def test_distinct_experts_near_what_was_measured() -> None:
    """A DeepSeek-V3 layer at 32 tokens activated 162 of its 256 experts."""
    assert distinct_uniform(256, 8, 32) == pytest.approx(162, rel=0.01)


@given(
    experts=st.integers(1, 512),
    share=st.floats(0, 1),
    tokens=st.integers(0, 4096),
)
def test_distinct_experts_stay_in_range(experts: int, share: float, tokens: int) -> None:
    top_k = max(1, round(share * experts))
    found = distinct_uniform(experts, top_k, tokens)
    assert 0 <= found <= min(experts, top_k * tokens) + 1e-6
    assert found <= distinct_uniform(experts, top_k, tokens + 1) + 1e-9


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_agreement_activates_no_more_than_independence(size: int, used: int, tokens: int) -> None:
    experts, top_k = 8 * size, size
    agreed = distinct_grouped(experts, top_k, tokens, 8, used)
    assert agreed <= distinct_uniform(experts, top_k, tokens) + 1e-9


@pytest.mark.parametrize(("groups", "used", "top_k"), [(7, 1, 1), (8, 9, 1), (8, 0, 1), (8, 1, 9)])
def test_impossible_groups(groups: int, used: int, top_k: int) -> None:
    with pytest.raises(LeanMoeError, match=r"not possible|is above"):
        distinct_grouped(64, top_k, 4, groups, used)


QWEN3_5 = Fingerprint("Qwen3_5MoeForConditionalGeneration", 40, 40, 256, 8)


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
    first, second = (replace(QWEN3_5, architecture=name) for name in (one, other))
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
    assert QWEN3_5.difference(replace(QWEN3_5, **changes)) == field  # type: ignore[arg-type]


def test_numbers_may_be_lists_with_one_for_each_layer() -> None:
    changed = {**QWEN3, "num_experts_per_tok": [8] * 48, "moe_intermediate_size": [768] * 48}
    assert read_shape(changed) == read_shape(QWEN3)
    dense_first = read_shape({**QWEN3, "num_experts": [0] + [128] * 47})
    assert dense_first.moe_layers == tuple(range(1, 48))


def test_hunyuans_lists_are_its_published_size() -> None:
    shape = read_shape(
        {
            "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe",
            "vocab_size": 128167, "hidden_size": 4096, "intermediate_size": 3072,
            "moe_intermediate_size": [3072] * 32, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "num_experts": 64, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32,
            "use_qk_norm": True, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    assert shape.total_parameters() == pytest.approx(80e9, rel=0.01)
    assert shape.active_parameters() == pytest.approx(13e9, rel=0.03)  # stated so roughly


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "new", "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}},
        {"model_type": "new", "text_config": {"n_routed_experts": 64}},
        {"model_type": "new", "num_experts": [64, 64]},
        {"model_type": "switch", "num_experts": 8},
    ],
)
def test_a_mixture_of_no_known_family_is_not_called_dense(config: Any) -> None:
    with pytest.raises(LeanMoeError, match=r"mixture-of-experts model_type .* is not known"):
        read_shape(config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_size": 64},
        {"model_type": "new", "num_experts": 1, "num_experts_per_tok": 2},
        {"model_type": "new", "text_config": {"num_local_experts": 0}},
    ],
)
def test_a_dense_model_is_called_dense(config: Any) -> None:
    with pytest.raises(LeanMoeError, match="it is not a mixture-of-experts model"):
        read_shape(config)


def test_a_config_without_its_count_of_experts_lacks_a_setting() -> None:
    config = {name: value for name, value in QWEN3.items() if name != "num_experts"}
    with pytest.raises(LeanMoeError, match=r"num_experts .* is missing"):
        read_shape(config)


def test_no_architectures_is_the_same_model() -> None:
    bare = {name: value for name, value in QWEN3.items() if name != "architectures"}
    assert read_shape(bare).fingerprint().difference(read_shape(QWEN3).fingerprint()) is None


def test_a_part_without_a_type_has_the_wrappers() -> None:
    part = {name: value for name, value in QWEN3.items() if name != "model_type"}
    shape = read_shape({"model_type": "qwen3_vl_moe", "text_config": part})
    assert shape.model_type == "qwen3_vl_moe_text"
    assert "no class that loads qwen3_vl_moe" in str(shape.not_loadable)
    assert read_shape({"model_type": "qwen3_5_moe", "text_config": {
        **QWEN3, "model_type": "qwen3_moe"}}).not_loadable is None  # fmt: skip
    assert read_shape(QWEN3).not_loadable is None
