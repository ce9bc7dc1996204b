"""The most loaded rank, and the ranks that a token's experts lie on."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.models.shape import distinct_uniform
from leanmoe.predict.experts.spread import busiest, ranks_touched
from tests.predict.experts.test_assumed import routed


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_the_busiest_rank_is_as_drawn(ranks: int) -> None:
    draw = np.random.default_rng(3)
    experts, k, tokens = 256, 8, 48
    rows, distinct = [], []
    for _ in range(200):
        chosen = np.concatenate([draw.permutation(experts)[:k] for _ in range(tokens)])
        rank = chosen // (experts // ranks)
        rows.append(np.bincount(rank, minlength=ranks).max())
        distinct.append(max(len(np.unique(chosen[rank == r])) for r in range(ranks)))
    found = busiest(distinct_uniform(experts, k, tokens), tokens * k, experts, ranks)
    assert found.distinct == pytest.approx(np.mean(distinct), rel=0.1)
    assert found.rows == pytest.approx(np.mean(rows), rel=0.1)


@pytest.mark.parametrize(("ranks", "groups", "used"), [(8, 1, 1), (8, 8, 4), (4, 1, 1)])
def test_ranks_touched_is_as_drawn(ranks: int, groups: int, used: int) -> None:
    draw = np.random.default_rng(4)
    tokens = routed(draw, 600, 64, 6, groups, used)
    touched = np.mean([len({e // (64 // ranks) for e in token}) for token in tokens])
    # A router that ranks groups by their best two takes something from each: more than at random.
    off = 0.12 if used < groups else 0.03
    assert ranks_touched(64, 6, ranks, groups, used) == pytest.approx(touched, rel=off)
