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
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths
from leanmoe.predict.traffic.sweep import (
    Limits,
    SweepPoint,
    cheapest,
    deployments,
    front,
    gpus_for,
    within,
)
from leanmoe.predict.traffic.sweep_results import FULL, sweep_results

MODEL = published_shape("deepseek-ai/DeepSeek-V3")


def point(per_user: float, per_gpu: float) -> SweepPoint:
    return SweepPoint("p", 8, 8, 1, 1, 1, 1, per_gpu * 8, 0.1, 1 / per_user)


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
    assert cheapest(within(points, tpot=1 / 40)) == points[1]
    assert cheapest(within(points, ttft=0.01)) is None
    assert gpus_for(points[0], 801) == 16
    assert points[0].cost(2.0) == pytest.approx(2.0 * 8 / (800 * 3600) * 1e6)


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
    lengths = read_lengths("1024", "x")
    started = time.monotonic()
    found = sweep_results(
        MODEL,
        {"plan": plan},
        GPUS["h200"],
        [8, 16, 32, 64, 128, 1024],
        ServiceLoadModel(lengths, lengths, 1),
        [2**n for n in range(13)],
        shipped(),
        "sglang-triton",
        partial(assumed_curves, MODEL, Assumed()),
        Limits(tpot_ms=50, price=2.0),
    )
    assert found["configurations"] >= 1000
    assert (time.monotonic() - started) * 1000 / found["configurations"] < 10
    full, fewer = (found["fronts"][name] for name in (FULL, "plan"))
    assert max(p["per_gpu"] for p in fewer) >= max(p["per_gpu"] for p in full)
    one, other = found["cheapest"]
    assert one["point"]["tpot_ms"] <= 50
    assert other["cost_a_million"] <= one["cost_a_million"]
    assert other["gpus_saved_share"] >= 0


def test_a_model_that_fits_nowhere_says_by_how_much() -> None:
    lengths = read_lengths("1024", "x")
    with pytest.raises(LeanMoeError, match=r"fits none of these GPUs.*GB short"):
        sweep_results(
            MODEL,
            {},
            GPUS["l40s"],
            [1],
            ServiceLoadModel(lengths, lengths, 1),
            [1],
            shipped(),
            "sglang-triton",
            partial(assumed_curves, MODEL, Assumed()),
            Limits(),
        )
    with pytest.raises(LeanMoeError, match="--price is -1"):
        Limits(price=-1).check()
