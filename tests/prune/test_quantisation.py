"""Expert numbers in quantisation settings: lists, keys and patterns, under the new numbers."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.prune.quantisation import Chosen, is_settings_file, renumbered_settings

CHOSEN: Chosen = {1: (1, 3), 2: (0, 3)}
SAME: Chosen = {1: (1, 3), 2: (1, 3)}


def name(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.down_proj"


def test_names_in_lists_and_keys_get_their_experts_new_numbers() -> None:
    settings = {
        "bits": 4,
        "ignore": ["lm_head", name(1, 3), name(2, 2), "model.layers.1.mlp.shared_experts.up_proj"],
        "extra_config": {name(1, 1): {"bits": 8}, name(1, 2): {"bits": 8}, name(0, 2): {}},
        "config_groups": {"group_0": {"targets": [name(2, 3)], "weights": {"num_bits": 4}}},
    }
    assert renumbered_settings(settings, CHOSEN) == {
        "bits": 4,
        "ignore": ["lm_head", name(1, 1), "model.layers.1.mlp.shared_experts.up_proj"],
        "extra_config": {name(1, 0): {"bits": 8}, name(0, 2): {}},
        "config_groups": {"group_0": {"targets": [name(2, 1)], "weights": {"num_bits": 4}}},
    }


@pytest.mark.parametrize(
    "every",
    [r"re:.*mlp\.experts\.\d+\.down_proj", "re:.*experts.[0-9]+.up", "*.experts.*", "re:.*lm_head"],
)
def test_a_pattern_of_every_expert_stays(every: str) -> None:
    assert renumbered_settings({"targets": [every]}, CHOSEN) == {"targets": [every]}


@pytest.mark.parametrize(
    "some",
    [r"re:.*experts\.3\.down_proj", r"re:.*experts\.(0|3)\.", "*.experts.3.*", "experts.3.down"],
)
def test_what_names_other_experts_in_each_layer_is_refused(some: str) -> None:
    with pytest.raises(LeanMoeError, match="which cannot be given the experts' new numbers"):
        renumbered_settings({"dynamic": {some: {}}}, CHOSEN)


def test_a_name_without_a_layer_is_renumbered_where_layers_keep_the_same() -> None:
    settings: dict[str, Any] = {"modules_to_not_convert": ["experts.3.down", "experts.2.down"]}
    assert renumbered_settings(settings, SAME) == {"modules_to_not_convert": ["experts.1.down"]}


def test_a_list_of_every_expert_of_a_block_names_those_that_remain() -> None:
    every = ["mlp.gate", *(f"mlp.experts.{expert}.up_proj" for expert in range(4))]
    settings = {"modules_in_block_to_quantize": [["self_attn.q_proj"], every]}
    assert renumbered_settings(settings, CHOSEN) == {
        "modules_in_block_to_quantize": [["self_attn.q_proj"], every[:3]]
    }
    with pytest.raises(LeanMoeError, match="cannot be given"):
        renumbered_settings({"names": every[:3]}, CHOSEN)


def test_files_of_settings_are_known_by_their_names() -> None:
    assert is_settings_file("hf_quant_config.json")
    assert is_settings_file("quantize_config.json")
    assert not is_settings_file("tokenizer.json")
