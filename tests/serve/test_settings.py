"""What a server and a recipe may be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.settings import ServeSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ServeSettings("m", engine="tgi"), "--engine is 'tgi'"),
        (ServeSettings("m", drop=("prompt",)), "--drop prompt leaves out a part of a plan"),
        (ServeSettings("m", port=0), "--port is 0"),
        (ServeSettings("m", tiers=True), "--tiers and --slo need the levels of a plan"),
        (ServeSettings("m", plan=Path("plan.json"), slo="tpot=30"), "no unit"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(settings: ServeSettings, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        settings.check()


def test_a_part_may_be_left_out_of_a_plan_that_is_given() -> None:
    ServeSettings("m", plan=Path("plan.json"), drop=("prompt",)).check()
