"""Published models by name, with the parameters that their makers state."""

from __future__ import annotations

import pytest

from leanmoe.models.shape import read_shape
from tests.published_bytes import CHECKPOINTS


def is_stated(billions: float, stated: str, tolerance: float) -> bool:
    """Whether a number is as near the stated one as `tolerance`, a share of it, or its digits."""
    _, _, digits = stated.partition(".")
    half = 0.5 * 10.0 ** -len(digits)
    half *= 10.0 ** (len(stated) - len(stated.rstrip("0"))) if not digits else 1.0
    return abs(billions - float(stated)) <= max(half, tolerance * float(stated))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_those_the_makers_state(name: str) -> None:
    published = CHECKPOINTS[name]
    shape = read_shape(published.config)
    total = shape.total_parameters() / 1e9 + published.beside
    assert is_stated(total, published.total, published.tolerance)
    assert published.note or published.tolerance == 0.01
    if published.active is not None:
        active = shape.active_parameters()
        active -= sum(getattr(shape.parameters, part) for part in published.left_out)
        assert is_stated(active / 1e9, published.active, published.tolerance)
