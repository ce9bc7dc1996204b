"""Lengths as distributions, and loads out of range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths


def load(
    inputs: str, outputs: str, at_once: int | None = None, rate: float | None = None
) -> ServiceLoadModel:
    return ServiceLoadModel(read_lengths(inputs, "in"), read_lengths(outputs, "out"), at_once, rate)


def test_lengths_as_distributions(tmp_path: Path) -> None:
    assert read_lengths("1024", "x").values == (1024,)
    assert read_lengths("1024", "x").remaining == 512
    even = read_lengths("100:300", "x")
    assert even.mean == pytest.approx(200, abs=1)
    assert read_lengths("100:300", "x").values == even.values
    heavy = read_lengths("1000~1.0", "x")
    assert np.median(heavy.values) == pytest.approx(1000, rel=0.05)
    assert heavy.mean > 1400  # e^0.5 medians, less what the quantiles cut off
    assert heavy.remaining > heavy.mean / 2
    path = tmp_path / "lengths.txt"
    path.write_text("10\n20\n30\n")
    assert read_lengths(str(path), "x").values == (10, 20, 30)
    path.write_text("10\nten\n")
    with pytest.raises(LeanMoeError, match="something that is no length"):
        read_lengths(str(path), "x")


@pytest.mark.parametrize(
    "text",
    ["", "a", "0", "-5", "5-0", "5-2", "2-9", "9:2", "1:2:3", "1e99", "9999999", "nan", "3~x"],
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(LeanMoeError, match="--input-len"):
        read_lengths(text, "--input-len")


@pytest.mark.parametrize(
    ("at_once", "rate", "says"),
    [(None, None, "either"), (1, 1.0, "either"), (0, None, "1 or more"), (None, 0.0, "above 0")],
)
def test_loads_out_of_range(at_once: int | None, rate: float | None, says: str) -> None:
    with pytest.raises(LeanMoeError, match=says):
        load("8", "8", at_once, rate).check()
