"""Sums by document: what may be paired, how they add up, and which source they are of."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.stats.losses import Divergence, Losses, require_paired


def losses(count: int, scale: float = 1.0) -> Losses:
    names = tuple(f"d{n}" for n in range(count))
    return Losses(names, scale * np.linspace(200, 400, count), np.full(count, 100))


def test_losses_of_other_texts_are_not_compared() -> None:
    full = plan = losses(30)
    fewer = Losses(plan.names[:29], plan.loss_U[:29], plan.tokens_U[:29])
    with pytest.raises(LeanMoeError, match="30 documents in one, 29 in the other"):
        require_paired(full, fewer)
    other = Losses(plan.names, plan.loss_U, plan.tokens_U + np.eye(30, dtype=np.int64)[4])
    with pytest.raises(LeanMoeError, match="document 'd4' has 100 predicted tokens in one and 101"):
        require_paired(full, other)


def test_sums_add_up_and_survive_json() -> None:
    full, plan = losses(3), losses(3, 1.01)
    assert Losses.from_json(plan.to_json()).loss_U.tolist() == plan.loss_U.tolist()
    once = Divergence(np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0, 8.0]), plan, full)
    assert (once + once).mean_kl == pytest.approx(6.0 / 300)
    assert once.loss_difference == pytest.approx(plan.mean - full.mean)
    assert (once + once).flips == pytest.approx(12 / 300)
    assert Divergence.from_json(once.to_json()).to_json() == once.to_json()


def test_the_worst_tenth_is_of_the_documents_that_lose_most() -> None:
    full = losses(20)
    harm_U = np.array([*[0.01] * 18, 0.2, 0.3])
    plan = Losses(full.names, full.loss_U * (1 + harm_U), full.tokens_U)
    worst = Divergence(np.zeros(20), np.zeros(20), plan, full).worst_tenth()
    assert 0.2 < worst < 0.3
    assert Divergence(np.zeros(20), np.zeros(20), full, full).worst_tenth() == 0


def test_documents_are_numbered_by_their_source() -> None:
    alone = losses(4)
    assert alone.units().tolist() == [0, 1, 2, 3]
    of_two = Losses(alone.names, alone.loss_U, alone.tokens_U, ("b", "a", "b", "a"))
    assert of_two.units().tolist() == [0, 1, 0, 1]
    assert Losses.from_json(of_two.to_json()).sources == of_two.sources
    with pytest.raises(LeanMoeError, match="not paired"):
        require_paired(alone, of_two)
