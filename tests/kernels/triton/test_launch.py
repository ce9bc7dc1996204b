"""What the experts' programs are compiled with."""

from __future__ import annotations

import pytest

from leanmoe.kernels import ExpertWeights, Gate
from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.launch import ExpertsCall, operands
from tests.kernels.layers import random_call, random_layer


def options(weights: ExpertWeights, config: ExpertsConfig) -> tuple[dict[str, object], ...]:
    call = ExpertsCall(*random_call(weights, tokens=3, slots=2), operands(weights), config)
    return call._up, call._down


def test_operands_say_what_the_gate_is() -> None:
    weights = operands(random_layer(gate=Gate("relu", limit=0.5)))
    assert (weights.limit, weights.alpha, weights.up_offset) == (0.5, 1.0, 0.0)
    assert operands(random_layer()).limit == float("inf")


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_are_those_of_the_layout(transposed: bool) -> None:
    weights = random_layer(transposed=transposed)
    up, down = options(weights, ExpertsConfig())
    assert (up["STRIDE_N"], up["STRIDE_K"]) == (
        (1, 2 * weights.width) if transposed else (weights.hidden, 1)
    )
    assert (down["STRIDE_N"], down["STRIDE_K"]) == (
        (1, weights.hidden) if transposed else (weights.width, 1)
    )


def test_the_copy_engine_reads_only_rows_of_whole_16_bytes() -> None:
    config = ExpertsConfig(gate_up=Tile(use_tma=True), down=Tile(use_tma=True))
    up, _ = options(random_layer(hidden=40), config)
    assert up["USE_TMA"]
    up, _ = options(random_layer(hidden=39), config)
    assert not up["USE_TMA"]


def test_groups_and_tails_are_for_grouped_ids_alone() -> None:
    grouped, _ = options(random_layer(), ExpertsConfig(TAIL_M=16))
    direct, _ = options(random_layer(), ExpertsConfig(is_direct=True))
    assert {"GROUP_M", "TAIL_M"} <= set(grouped)
    assert not {"GROUP_M", "TAIL_M"} & set(direct)
    assert direct["SLOTS"] == 2
