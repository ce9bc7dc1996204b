"""What a table's contradictions leave for any model, against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.predict.published_tiles import steps
from benchmarks.predict.table_noise import least_rising, noise, times_beaten
from leanmoe.predict.kernels.tables import Measured


def off(curve: np.ndarray, seconds: np.ndarray) -> float:
    return float(np.abs(curve / seconds - 1).mean())


@given(st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.0]), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_no_rising_curve_is_nearer(values: list[float]) -> None:
    seconds = np.array(values)
    found = least_rising(seconds)
    assert (np.diff(found) >= 0).all()
    # Some best curve takes its values from the readings.
    rising = (np.array(c) for c in product(sorted(set(values)), repeat=len(values)))
    least = min(off(curve, seconds) for curve in rising if (np.diff(curve) >= 0).all())
    assert off(found, seconds) == pytest.approx(least)


def row(tensor: int, expert: int, tokens: int, seconds: float) -> Measured:
    return Measured(2048, 768, 128, 8, tensor, expert, tokens, seconds)


def test_less_work_that_took_longer_is_beaten() -> None:
    rows = [row(1, 1, 8, 3.0), row(1, 2, 8, 6.0), row(2, 1, 8, 1.0), row(1, 1, 4, 9.0)]
    assert times_beaten(rows).tolist() == [1.0, 2.0, 1.0, 3.0]
    found = noise(rows)
    assert found["worst error of any model that rises with work, at least"] == 0.5
    assert found["rows that at least as much work beat twofold"] == 0.25
    assert found["best rising curve through each layer's own points, mean error"] > 0


def test_the_nearest_configuration_is_taken() -> None:
    tile = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64}
    wide = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128}
    named = {"triton_version": "3.5", "1": tile, "4": tile, "32": wide}
    assert steps(named) == "18:16x64 1000000000:128x128"
