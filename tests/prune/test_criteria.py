"""What is seen of the experts, against plain loops; what criteria make of it; what remains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import FAMILIES
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.prune.criteria import (
    CRITERIA,
    ExpertStatistics,
    as_plan,
    best_experts,
    kept_count,
    rank_experts,
    restricted,
    watch,
)
from leanmoe.runtime import find_layers, shape_of
from leanmoe.scoring.windows import Windows
from tests import tiny
from tests.prune.test_checkpoint import NO_ROUND_TRIP, NOT_BUILT

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


STREAMS = "several residual streams"
NOT_WATCHED = {
    "deepseek_v4": STREAMS,
    "glm5_next_text": STREAMS,
    "hy_v4": STREAMS,
    "longcat_flash": "not behind Transformers' experts interface",
}
"""Families whose experts cannot be ranked by what they do, and what is said."""


def seen(model: Any, real_T: torch.Tensor | None = None) -> ExpertStatistics:
    with watch(model) as watching, torch.inference_mode():
        watching.real_T = real_T
        model(input_ids=IDS, use_cache=False)
    return watching.result()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "minimax_m2"])
def test_sums_are_those_of_plain_loops(family: str) -> None:
    model = tiny.build(family)
    layers = find_layers(model)
    calls: dict[int, Any] = {}
    for layer in layers:
        layer.experts.register_forward_hook(
            lambda _m, inputs, out, n=layer.number: calls.__setitem__(n, (inputs, out))
        )
    real = torch.rand(18, generator=torch.Generator().manual_seed(1)) < 0.7
    found = seen(model, real)
    for layer in layers:
        (hidden, ids, weights), _ = calls[layer.number]
        outputs = layer.all_outputs(hidden).detach()
        slots, gates, added = (np.zeros(16) for _ in range(3))
        for token in range(18):
            for expert, gate in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
                if real[token]:
                    slots[expert] += 1
                    gates[expert] += gate
                    added[expert] += gate * float(outputs[token, expert].norm())
        np.testing.assert_allclose(found.slots_LE[layer.number], slots)
        np.testing.assert_allclose(found.gates_LE[layer.number], gates, rtol=1e-5)
        np.testing.assert_allclose(found.outputs_LE[layer.number], added, rtol=1e-4)
        assert (found.changes_LE[layer.number] <= 2 * added + 1e-6).all()
    assert found.tokens == int(real.sum())


@pytest.mark.parametrize("family", sorted(n for n in FAMILIES if not FAMILIES[n].not_runnable))
def test_every_family_can_be_watched(family: str) -> None:
    if family in NOT_BUILT | NO_ROUND_TRIP:
        pytest.skip("Transformers cannot run it so tiny")
    model = tiny.build(family)
    if reason := NOT_WATCHED.get(family):
        with pytest.raises(LeanMoeError, match=reason):
            seen(model)
        return
    found = seen(model)
    assert (found.slots_LE.sum(axis=1) == 18 * shape_of(model).top_k).all()
    assert (found.changes_LE >= -1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_output_that_is_no_finite_number_names_the_layer(bad: float) -> None:
    model = tiny.build("qwen3_moe")
    used = int(seen(model).slots_LE[1].argmax())
    find_layers(model)[1].experts.down_proj.data[used, 0, 0] = bad
    with pytest.raises(LeanMoeError, match=f"MoE layer 1, expert {used}: .* not finite"):
        seen(model)


def test_nothing_run_is_said() -> None:
    with watch(tiny.build("qwen3_moe")) as watching:
        pass
    with pytest.raises(LeanMoeError, match="no text was run"):
        watching.result()


def test_extreme_experts_are_found_and_ordinary_ones_are_not() -> None:
    model = tiny.build("qwen3_moe")
    assert seen(model).super_experts() == []
    find_layers(model)[2].experts.down_proj.data[7] *= 3000
    assert seen(model).super_experts() == [(2, 7)]


def test_criteria_by_number_need_no_text() -> None:
    def first(name: str, kept: int) -> list[int]:
        by_number = CRITERIA[name].by_number
        assert by_number is not None
        order = np.argsort(-by_number(8, 0), kind="stable")
        return sorted(order[:kept].tolist())

    assert first("odd", 4) == [1, 3, 5, 7]
    assert first("even", 4) == [0, 2, 4, 6]
    assert first("first-half", 4) == [0, 1, 2, 3]
    assert first("last-half", 4) == [4, 5, 6, 7]
    assert first("odd", 6) == [0, 1, 2, 3, 5, 7]
    shape = shape_of(tiny.build("qwen3_moe"))
    layers = rank_experts(CRITERIA["random"], shape, 3)
    assert layers.shape == (len(shape.moe_layers), shape.experts)
    assert not np.array_equal(layers[0], layers[1])
    assert np.array_equal(layers, rank_experts(CRITERIA["random"], shape, 3))


def test_an_unknown_criterion_names_near_ones() -> None:
    with pytest.raises(LeanMoeError, match="did you mean reap"):
        CRITERIA["reep"]


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_has_a_formula_a_title_and_a_source(name: str) -> None:
    criterion = CRITERIA[name]
    functions = (criterion.by_number, criterion.by_statistics, criterion.by_model)
    assert [each is None for each in functions].count(False) == 1
    assert criterion.formula.startswith("S_j")
    assert criterion.title
    assert criterion.source.startswith("arXiv") or criterion.source == "ours"


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_expert_of_every_layer(name: str) -> None:
    model = tiny.build("qwen3_moe")
    shape, windows = shape_of(model), Windows.of_ids(IDS)
    scores = rank_experts(CRITERIA[name], shape, 0, model, windows, least=12)
    assert scores.shape == (len(shape.moe_layers), shape.experts)
    assert np.isfinite(scores).all()


def test_reap_is_the_mean_and_output_sum_the_sum_of_weighted_output_lengths() -> None:
    found = seen(tiny.build("qwen3_moe"))
    reap, total = (CRITERIA[name].by_statistics for name in ("reap", "output-sum"))
    assert reap is not None
    assert total is not None
    np.testing.assert_allclose(reap(found) * np.maximum(found.slots_LE, 1), total(found))


@pytest.fixture(scope="module")
def grouped() -> MoEShape:
    return read_shape(tiny.config("glm4_moe").to_dict())


@pytest.fixture(scope="module")
def plain() -> MoEShape:
    return read_shape(tiny.config("qwen3_moe").to_dict())


def test_groups_stay_whole_where_a_token_may_use_all_of_them() -> None:
    shape = read_shape({**tiny.config("deepseek_v3").to_dict(), "topk_group": 4})
    assert not shape.router.limits_groups
    assert kept_count("10", shape) == 8
    (kept, *_) = best_experts(rank_experts(CRITERIA["odd"], shape, 0), 8, shape)
    assert [sum(expert // 4 == group for expert in kept) for group in range(4)] == [2] * 4


@pytest.mark.parametrize(
    ("text", "kept"), [("75%", 12), ("12", 12), ("87.5%", 12), ("100%", 16), ("50%", 8)]
)
def test_shares_and_numbers(grouped: MoEShape, text: str, kept: int) -> None:
    assert kept_count(text, grouped) == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("most", "a share like 75%"),
        ("0%", "it must leave"),
        ("120%", "it must leave"),
        ("-3", "it must leave"),
        ("nan%", "it must leave"),
        ("25%", "leaves 2 in the 2 groups"),
    ],
)
def test_what_cannot_be_kept(grouped: MoEShape, text: str, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        kept_count(text, grouped)


def test_fewer_than_a_token_needs(plain: MoEShape) -> None:
    with pytest.raises(LeanMoeError, match="leaves 3: a token needs 4"):
        kept_count("3", plain)
    assert kept_count("4", plain) == 4


def test_the_best_remain_lower_numbers_among_equals(plain: MoEShape) -> None:
    scores = np.zeros((2, 16))
    scores[1, [9, 11]] = 1.0
    kept = best_experts(scores, 4, plain)
    assert kept == ((0, 1, 2, 3), (0, 1, 9, 11))


def test_as_many_in_each_group(grouped: MoEShape) -> None:
    kept = best_experts(np.arange(16.0)[None], 8, grouped)
    assert kept == ((2, 3, 6, 7, 10, 11, 14, 15),)


def test_protected_experts_remain_or_it_is_said(grouped: MoEShape) -> None:
    kept = best_experts(np.arange(16.0)[None], 8, grouped, [(0, 0)])
    assert kept == ((0, 3, 6, 7, 10, 11, 14, 15),)
    with pytest.raises(LeanMoeError, match="3 protected experts where 2 may remain"):
        best_experts(np.arange(16.0)[None], 8, grouped, [(0, 0), (0, 1), (0, 2)])


def test_as_a_plan(plain: MoEShape) -> None:
    kept = best_experts(np.random.default_rng(0).random((4, 16)), 12, plain)
    plan = as_plan(kept, plain)
    plan.check(plain.fingerprint())
    assert [rule.experts for rule in plan.rules_for(1)] == list(kept)


def test_a_plan_restricted_to_experts_uses_no_others_at_any_load(plain: MoEShape) -> None:
    kept = ((0, 1, 2, 3, 9), (4, 5, 6, 7, 8)) * 2
    rules = (Rule(top_k=3, renormalise=0.0), Rule(budget=7, budget_per_rank=6)) * 2
    plan = Plan.banded(plain.fingerprint(), (Band(8, rules),), (Rule(top_k=0), Rule()) * 2)
    found = restricted(plan, kept)
    found.check(plain.fingerprint())
    assert found.rules_for(4)[:2] == (
        Rule(top_k=3, renormalise=0.0, experts=kept[0]),
        Rule(budget=5, experts=kept[1], budget_per_rank=5),
    )
    assert found.rules_for(999) == tuple(Rule(experts=experts) for experts in kept)
    assert found.prompt[:2] == (Rule(top_k=0, experts=kept[0]), Rule(experts=kept[1]))
