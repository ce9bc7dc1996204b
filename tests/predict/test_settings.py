"""What predict and calibrate refuse before they compute or measure anything."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.settings import CalibrateSettings, PredictSettings


@pytest.mark.parametrize("name", ["tpot", "ttft", "price"])
def test_a_sweeps_limits_are_above_0(name: str) -> None:
    below: dict[str, Any] = {name: -1}
    with pytest.raises(LeanMoeError, match=f"--{name} is -1: it must be above 0"):
        PredictSettings("m", sweep=True, **below).check()
    above: dict[str, Any] = {name: 1.0}
    with pytest.raises(LeanMoeError, match="go with --sweep"):
        PredictSettings("m", **above).check()


def test_several_numbers_of_gpus_go_with_a_sweep() -> None:
    PredictSettings("m", gpus=(8, 16), sweep=True).check()
    with pytest.raises(LeanMoeError, match="--gpus is '8,16': several numbers go with --sweep"):
        PredictSettings("m", gpus=(8, 16)).check()


@pytest.mark.parametrize("tokens", [(1, 2), (1, 1, 2), (1, 2, 70000)])
def test_constants_need_enough_sizes_in_range(tokens: tuple[int, ...]) -> None:
    with pytest.raises(LeanMoeError, match="3 or more numbers, each from 1 to 65536"):
        CalibrateSettings("h200", tokens=tokens).check()
