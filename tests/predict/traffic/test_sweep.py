"""Sweeps: the front, limits, what is saved, and that a thousand take seconds."""

from __future__ import annotations

import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import published_shape
from leanmoe.plan import Plan, Rule
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.prediction import Basis
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths
from leanmoe.predict.traffic.sweep import (
    FULL,
    cheapest,
    cost,
    deployments,
    front,
    gpus_for,
    sweep,
    within,
)
from leanmoe.results.predict import SweepLimits, SweptPoint

MODEL = published_shape("deepseek-ai/DeepSeek-V3")


NO_LIMITS = SweepLimits(None, None, None)
LENGTHS = read_lengths("1024", "x")


def point(per_user: float, per_gpu: float) -> SweptPoint:
    return SweptPoint("p", 8, 8, 1, 1, 1, 1, per_gpu * 8, 100.0, 1e3 / per_user, per_user, per_gpu)


def basis(kernel: str = "sglang-triton") -> Basis:
    return Basis(kernel, partial(assumed_curves, MODEL, Assumed()))


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=40))
@settings(deadline=None)
def test_nothing_on_the_front_is_beaten_in_both(values: list[tuple[float, float]]) -> None:
    points = [point(*value) for value in values]
    best = front(points)
    for one in points:
        beaten = any(b.per_user >= one.per_user and b.per_gpu >= one.per_gpu for b in best)
        assert beaten
    for one in best:
        assert not any(p.per_user > one.per_user and p.per_gpu > one.per_gpu for p in points)


def test_limits_and_the_cheapest() -> None:
    points = [point(10, 100), point(50, 60), point(90, 20)]
    assert cheapest(within(points, SweepLimits(25.0, None, None))) == points[1]
    assert cheapest(within(points, SweepLimits(None, 10.0, None))) is None
    assert gpus_for(points[0], 801) == 16
    assert cost(points[0], 2.0) == pytest.approx(2.0 * 8 / (800 * 3600) * 1e6)


def test_every_split_is_allowed_and_fits() -> None:
    refused: dict[str, str] = {}
    found = deployments(GPUS["h200"], MODEL, [4, 8, 16, 64], refused)
    assert {here.gpus for here in found} == {8, 16, 64}
    for here in found:
        here.check(MODEL)
        here.memory(MODEL)
    assert any("does not fit" in why for why in refused.values())


def test_a_thousand_configurations_take_seconds() -> None:
    plan = Plan.uniform(MODEL.fingerprint(), Rule(top_k=6))
    started = time.monotonic()
    found = sweep(
        MODEL,
        {"plan": plan},
        GPUS["h200"],
        [8, 16, 32, 64, 128, 1024],
        [ServiceLoadModel(LENGTHS, LENGTHS, 2**n) for n in range(13)],
        basis(),
        SweepLimits(50, None, 2.0),
    )
    assert found.configurations >= 1000
    assert (time.monotonic() - started) * 1000 / found.configurations < 10
    full, fewer = (found.fronts[name] for name in (FULL, "plan"))
    assert max(p.per_gpu for p in fewer) >= max(p.per_gpu for p in full)
    one, other = found.cheapest
    assert one.point is not None
    assert one.point.tpot_ms <= 50
    assert other.cost_a_million is not None
    assert one.cost_a_million is not None
    assert other.cost_a_million <= one.cost_a_million
    assert other.gpus_saved_share is not None
    assert other.gpus_saved_share >= 0


def test_a_model_that_fits_nowhere_says_by_how_much() -> None:
    load = ServiceLoadModel(LENGTHS, LENGTHS, 1)
    with pytest.raises(LeanMoeError, match=r"fits none of these GPUs.*GB short"):
        sweep(MODEL, {}, GPUS["l40s"], [1], [load], basis(), NO_LIMITS)
