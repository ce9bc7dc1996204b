"""Fixed-sequence testing: stops at the first failure, and errs no more often than one test."""

from __future__ import annotations

import numpy as np

from leanmoe.stats.paired import (
    fixed_sequence,
)


def test_stops_at_the_first_failure_and_tests_nothing_behind_it() -> None:
    tested: list[int] = []

    def accepts(candidate: int) -> bool:
        tested.append(candidate)
        return candidate != 3

    assert fixed_sequence([1, 2, 3, 4], accepts) == (1, 2)
    assert tested == [1, 2, 3]
    assert fixed_sequence([], accepts) == ()


def test_errs_as_often_as_one_test_while_picking_the_best_does_not() -> None:
    draw = np.random.default_rng(0)
    bad = range(10)
    in_order = best_of = 0
    for _ in range(2000):
        passes = draw.random(len(bad)) < 0.05  # ten bad plans, each tested at 95%
        in_order += bool(fixed_sequence(bad, lambda n, passes=passes: bool(passes[n])))
        best_of += bool(passes.any())
    assert in_order < 0.065 * 2000
    assert best_of > 0.35 * 2000
