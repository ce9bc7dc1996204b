"""Numbers of experts that differ between layers: the total stays, the fitness never falls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.prune.allocation import (
    Counts,
    Evolution,
    allocate,
    evolve,
    fewest,
    first_windows,
    whole_step,
)
from leanmoe.prune.criteria import CRITERIA, rank_experts
from leanmoe.runtime import shape_of
from leanmoe.scoring.windows import Windows
from tests.runtime.families import build


@pytest.fixture(scope="module")
def shape() -> MoEShape:
    return read_shape("reference")


WANTED = (56, 24, 40, 32, 48, 40)


def likeness(counts: Counts) -> float:
    return -float(sum(abs(a - b) for a, b in zip(counts, WANTED, strict=True)))


def test_evolution_finds_what_is_fittest_and_keeps_the_total(shape: MoEShape) -> None:
    seen: list[Counts] = []

    def fitness(counts: Counts) -> float:
        seen.append(counts)
        return likeness(counts)

    evolution = Evolution(generations=40, children=12, step_share=1 / 8)
    found = evolve(40, shape, fitness, evolution, seed=1)
    assert found.counts == WANTED
    assert found.fitness == 0 > found.even_fitness == likeness((40,) * 6)
    assert all(sum(counts) == 240 for counts in seen)
    assert all(count % 8 == 0 and 16 <= count <= 64 for counts in seen for count in counts)
    assert len(set(seen)) == len(seen) == found.measured
    again = evolve(40, shape, likeness, evolution, seed=1)
    assert again == found


def test_even_numbers_stay_where_none_are_fitter(shape: MoEShape) -> None:
    found = evolve(32, shape, lambda counts: -float(max(counts)), Evolution(generations=2))
    assert found.counts == (32,) * 6


def test_what_cannot_differ_is_said(shape: MoEShape) -> None:
    assert fewest(shape) == 16  # 2 in each of 8 groups: a group is ranked by its best 2
    assert whole_step(shape, 1 / 16) == 8
    with pytest.raises(LeanMoeError, match="cannot keep different numbers"):
        evolve(64, shape, likeness)
    with pytest.raises(LeanMoeError, match="1 layers"):
        evolve(32, replace(shape, moe_layers=(1,)), likeness)


def test_an_allocation_is_found_by_acceptance_on_windows() -> None:
    model = build("qwen3_moe")
    shape = shape_of(model)
    ids_SN = torch.randint(1, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    windows = first_windows(Windows.of_ids(ids_SN), 48)
    assert len(windows.ids_SN) == 2
    scores_LE = rank_experts(CRITERIA.get("first-half"), shape, 0)
    found = allocate(model, scores_LE, windows, shape, 6)
    assert sum(found.counts) == 6 * len(shape.moe_layers)
    assert 0 < found.even_fitness <= found.fitness <= 1
