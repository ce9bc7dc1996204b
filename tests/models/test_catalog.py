"""Published models by name, with the parameters that their makers state."""

from __future__ import annotations

import pytest

from leanmoe.models.shape import read_shape
from tests.published import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_the_makers_state(name: str) -> None:
    published = MODELS[name]
    shape = read_shape(published.config)
    assert shape.total_parameters() / 1e9 == pytest.approx(published.total, rel=0.015)
    if published.active is not None:
        active = shape.active_parameters()
        if not published.counts_embedding:
            active -= shape.parameters.embedding
        assert active / 1e9 == pytest.approx(published.active, rel=0.03)
