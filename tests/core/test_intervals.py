"""Intervals hold what statistics write of them."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import LossChange, LossGap, Margin, MeanChange, RatioOfRuns
from leanmoe.core.schema import from_json, to_json
from leanmoe.stats.paired import ratio_of_sums


def test_a_change_in_loss_holds_an_estimate() -> None:
    draw = np.random.default_rng(0)
    estimate = ratio_of_sums(draw.normal(1, 1, 50), draw.uniform(90, 110, 50), 0.9)
    change = from_json(LossChange, estimate.to_json(), "loss")
    assert (change.low, change.high, change.documents) == (estimate.low, estimate.high, 50)


def test_intervals_are_written_field_by_field() -> None:
    assert to_json(RatioOfRuns(1.1, 1.0, 1.2, 5)) == {
        "median": 1.1,
        "low": 1.0,
        "high": 1.2,
        "repeats": 5,
    }
    assert to_json(MeanChange(0.1, 0.0, 0.2)) == {"mean": 0.1, "low": 0.0, "high": 0.2}
    assert to_json(LossGap(0.1, 0.0, 0.2)) == {"difference": 0.1, "low": 0.0, "high": 0.2}


@pytest.mark.parametrize(
    ("words", "value", "in_nats", "shown"),
    [
        ("0.5%", 0.005, False, "0.5%"),
        ("0.005", 0.005, False, "0.5%"),
        ("0.01 nats", 0.01, True, "0.01 nats"),
    ],
)
def test_a_margin_is_a_share_or_nats(words: str, value: float, in_nats: bool, shown: str) -> None:
    margin = Margin.parse("--margin", words)
    assert margin.value == pytest.approx(value)
    assert (margin.in_nats, str(margin)) == (in_nats, shown)
    assert margin.show(-0.002) == ("-0.0020 nats" if in_nats else "-0.20%")


@pytest.mark.parametrize("words", ["x", "0", "-1%", "150%", "2", "1% nats", "nats", "nan"])
def test_another_margin_is_refused(words: str) -> None:
    with pytest.raises(
        LeanMoeError, match=r"margin is .*: it must be (a share like 0.5%|above 0 and below 1)"
    ):
        Margin.parse("--margin", words)
