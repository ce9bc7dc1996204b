"""Constants are found where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import distinct_uniform
from leanmoe.predict.constants import ANY, KernelConstants, Regime
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import ExpertsShape, PredictedTile, Rows
from leanmoe.predict.kernels.fit import Form, Reading, accuracy, errors_of, fit, stages

H200 = GPUS["h200"]


TRUTH = KernelConstants(
    "made-up",
    "h200",
    "bfloat16",
    (Regime(1 << 20, PredictedTile(16, 64), {"call": 12.0, "weights": 1.15, "slots_hidden": 2.0}),),
    "nothing",
)


def readings(noise: float = 0.0) -> list[Reading]:
    draw = np.random.default_rng(0)
    found = []
    for shape in (ExpertsShape(2048, 768, 128), ExpertsShape(4096, 1536, 64)):
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            distinct = distinct_uniform(shape.experts, 8, tokens)
            rows = Rows(tokens, 8, 8 * tokens, distinct)
            seconds = TRUTH.seconds(shape, rows, H200) * (1 + noise * draw.normal())
            found.append(Reading(shape, rows, seconds))
    return found


def test_the_fit_finds_what_made_the_readings() -> None:
    found = fit("made-up", H200, "bfloat16", readings(), "made-up readings", stages((32, ANY)))
    errors = errors_of(found, readings(), H200)
    assert np.abs(errors).max() < 1e-3


def test_one_broken_reading_does_not_bend_the_rest() -> None:
    broken = readings()
    broken[5] = Reading(broken[5].shape, broken[5].rows, broken[5].seconds * 7)
    names = ("call", "weights", "slots_hidden")
    found = fit("made-up", H200, "bfloat16", broken, "", stages((512,)), Form(names))
    errors = np.abs(errors_of(found, readings(), H200))
    assert np.median(errors) < 0.02
    assert errors.max() < 0.1


def test_too_few_readings() -> None:
    with pytest.raises(LeanMoeError, match="2 readings of made-up are too few"):
        fit("made-up", H200, "bfloat16", readings()[:2], "", stages((ANY,)))
    with pytest.raises(LeanMoeError, match="no row"):
        accuracy("nothing", np.array([]))
