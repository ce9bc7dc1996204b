"""What is seen of the experts, against plain loops; and what criteria make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import FAMILIES
from leanmoe.prune.criteria import (
    CRITERIA,
    ExpertStatistics,
    rank_experts,
    removal_order,
    watch,
)
from leanmoe.runtime import find_layers, record, shape_of
from leanmoe.scoring.windows import Windows
from tests import tiny
from tests.prune.test_checkpoint import NO_ROUND_TRIP, NOT_BUILT

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


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
    found = seen(model)
    assert (found.slots_LE.sum(axis=1) == 18 * shape_of(model).top_k).all()
    assert (found.changes_LE >= -1e-6).all()


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
        by_number = CRITERIA.get(name).by_number
        assert by_number is not None
        order = np.argsort(-by_number(8, 0), kind="stable")
        return sorted(order[:kept].tolist())

    assert first("odd", 4) == [1, 3, 5, 7]
    assert first("even", 4) == [0, 2, 4, 6]
    assert first("first-half", 4) == [0, 1, 2, 3]
    assert first("last-half", 4) == [4, 5, 6, 7]
    assert first("odd", 6) == [0, 1, 2, 3, 5, 7]
    shape = shape_of(tiny.build("qwen3_moe"))
    layers = rank_experts(CRITERIA.get("random"), shape, 3)
    assert layers.shape == (len(shape.moe_layers), shape.experts)
    assert not np.array_equal(layers[0], layers[1])
    assert np.array_equal(layers, rank_experts(CRITERIA.get("random"), shape, 3))


def test_an_unknown_criterion_names_near_ones() -> None:
    with pytest.raises(LeanMoeError, match="did you mean reap"):
        CRITERIA.get("reep")


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_has_a_formula_a_title_and_a_source(name: str) -> None:
    criterion = CRITERIA.get(name)
    functions = (criterion.by_number, criterion.by_statistics, criterion.by_model)
    (function,) = [each for each in functions if each is not None]
    assert "S_j" in (function.__doc__ or "")
    assert criterion.title
    assert criterion.source.startswith("arXiv") or criterion.source == "ours"


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_expert_of_every_layer(name: str) -> None:
    model = tiny.build("qwen3_moe")
    shape, windows = shape_of(model), Windows.of_ids(IDS)
    scores = rank_experts(CRITERIA.get(name), shape, 0, model, windows, least=12)
    assert scores.shape == (len(shape.moe_layers), shape.experts)
    assert np.isfinite(scores).all()


def test_reap_is_the_mean_and_output_sum_the_sum_of_weighted_output_lengths() -> None:
    found = seen(tiny.build("qwen3_moe"))
    reap, total = (CRITERIA.get(name).by_statistics for name in ("reap", "output-sum"))
    assert reap is not None
    assert total is not None
    np.testing.assert_allclose(reap(found) * np.maximum(found.slots_LE, 1), total(found))


def test_output_error_drops_first_whom_nobody_uses() -> None:
    model = tiny.build("deepseek_v3")
    layer, shape = find_layers(model)[0], shape_of(model)
    caught: dict[str, Any] = {}

    def catch(_module: Any, inputs: Any, _output: Any) -> None:
        caught["hidden"], caught["ids"] = inputs[0], inputs[1]

    layer.experts.register_forward_hook(catch)
    with record(model, lambda _n, logits: caught.__setitem__("logits", logits)):
        seen(model)
    used = set(caught["ids"][:6].flatten().tolist())
    scores = removal_order(
        layer, shape.router, 4, caught["hidden"][:6], caught["logits"][:6], 16 - len(used)
    )
    unused = 16 - len(used)
    assert 0 < unused < 16
    assert not set(np.argsort(scores, kind="stable")[: min(unused, len(used))].tolist()) & used
    assert (scores == 16).sum() == 16 - len(used)
