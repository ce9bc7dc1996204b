"""Router settings of a config are validated."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import family_of
from leanmoe.models.hf_config import HfConfig


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("routed_scaling_factor", "2", r"routed_scaling_factor is '2': it must be a number"),
        ("norm_topk_prob", 1, r"norm_topk_prob is 1: it must be true or false"),
        ("n_group", 0, r"n_group is 0: it must be a whole number, 1 or more"),
    ],
)
def test_router_settings_are_validated(name: str, value: object, message: str) -> None:
    family = family_of("deepseek_v3")
    with pytest.raises(LeanMoeError, match=message):
        family.router(HfConfig({name: value}, family.defaults))
