"""The tests of the plan: what holds for one seed alone is not said of a cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.renormalise.cells import cells_of, holm
from benchmarks.renormalise.measure import VALUES

DOCUMENTS = 60


def model(seed: int, best: float) -> dict[str, Any]:
    """Losses that rise with the distance from the best value."""
    draw = np.random.default_rng(seed)
    full_U = draw.uniform(50, 150, DOCUMENTS)

    def lost(a: float) -> list[float]:
        noise_U = draw.normal(0, 0.002, DOCUMENTS)
        rise_U = 0.02 + 0.04 * (a - best) ** 2 + noise_U
        return list((full_U * (1 + rise_U)).tolist())

    return {
        "router": "softmax",
        "shared_experts": 0,
        "seed": seed,
        "full": full_U.tolist(),
        "loss": {"6 of 8": {str(a): lost(a) for a in VALUES}},
    }


def test_what_both_seeds_show_is_found() -> None:
    (cell,) = cells_of([model(0, 0.4), model(1, 0.4)])
    assert cell.p_kept < 1e-3
    assert all(mean < 0 for mean in cell.kept_less_anew)
    assert cell.p_between < 1e-3
    assert {a for a, _ in cell.between_less_end} == {0.5}


def test_seeds_that_disagree_show_nothing() -> None:
    (cell,) = cells_of([model(0, 0.0), model(1, 1.0)])
    assert cell.p_kept == 1.0
    assert cell.p_between > 0.5


def test_holm_multiplies_the_smallest_by_their_number() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
