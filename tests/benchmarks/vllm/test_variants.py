"""What a benchmark of vLLM compares, from its command line."""

from __future__ import annotations

import pytest

from benchmarks.vllm.layout import SINGLE, Layout
from benchmarks.vllm.shapes import config_of
from benchmarks.vllm.variants import rule_of, variants_of
from leanmoe.models.shape import read_shape
from leanmoe.plan import Rule

SHAPE = read_shape(config_of("qwen3-30b-a3b", 2))
PLANS = "k=4: top_k=4; all: guaranteed=3 batch_scope=all; a rank: budget_per_rank=3/16"


def test_a_fraction_is_a_share_of_the_experts() -> None:
    assert rule_of("budget=3/8 top_k=4", 128) == Rule(budget=48, top_k=4)


def test_plans_that_are_another_in_this_layout_are_left_out() -> None:
    one = [v.name for v in variants_of(SHAPE, PLANS, ["group"], ["vllm"], SINGLE)]
    assert one == ["stock", "empty plan", "k=4"]
    spread = variants_of(SHAPE, PLANS, ["group"], ["vllm"], Layout(1, 2, True))
    assert [v.name for v in spread] == [*one, "all", "a rank"]
    assert spread[3].cross_rank
    assert spread[3].to_json()["batch_scope"] == "all"


def test_a_plan_runs_with_each_kind_of_small_step_and_of_experts() -> None:
    names = [v.name for v in variants_of(SHAPE, PLANS, ["group", "skip"], ["vllm", "leanmoe"])]
    assert names == ["stock", "empty plan", "stock, leanmoe", "k=4", "k=4, leanmoe"]
    shared = variants_of(SHAPE, "g: guaranteed=3", ["group", "skip"], ["vllm"])
    assert [v.name for v in shared[2:]] == ["g", "g, skip"]
    assert shared[3].is_second


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(SystemExit, match="--experts is cuda: it must be of vllm, leanmoe"):
        variants_of(SHAPE, PLANS, ["group"], ["cuda"])
