"""A service simulated event by event."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import published_shape
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepTime
from leanmoe.predict.traffic.closed_loop import closed_loop
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths
from leanmoe.predict.traffic.simulate import simulate

MODEL = published_shape("Qwen/Qwen3-30B-A3B")


STEP = StepTime(MODEL, Deployment(GPUS["h200"]), shipped(), "vllm-triton")


FULL = Activation(MODEL, None, assumed_curves(MODEL, Assumed()))


def load(
    inputs: str, outputs: str, at_once: int | None = None, rate: float | None = None
) -> ServiceLoadModel:
    return ServiceLoadModel(read_lengths(inputs, "in"), read_lengths(outputs, "out"), at_once, rate)


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    wanted = load("256:1024", "64:256", rate=10.0)
    first, again = (simulate(STEP, FULL, wanted, requests=100, seed=1) for _ in range(2))
    assert first == again
    assert simulate(STEP, FULL, wanted, requests=100, seed=2) != first


def test_arrivals_above_the_services_rate_pile_up() -> None:
    idle = simulate(STEP, FULL, load("256", "64", rate=0.5), requests=80)
    flooded = simulate(STEP, FULL, load("256", "64", rate=5000.0), requests=2000)
    assert idle.left <= 3
    assert flooded.left > 500
    assert flooded.ttft["mean"] > 5 * idle.ttft["mean"]
    assert idle.output_throughput == pytest.approx(0.5 * 64, rel=0.3)


def test_every_token_is_made() -> None:
    wanted = load("100:300", "5:50", 4)
    run = simulate(STEP, FULL, wanted, requests=64)
    assert run.requests == 64
    assert run.steps >= 64 * 5 / 4
    assert run.ttft["p99"] >= run.ttft["median"] > 0


def test_a_full_cache_holds_requests_back() -> None:
    wanted = load("32768", "1024", 512)
    steady = closed_loop(STEP, FULL, wanted)
    assert steady.running < 512
    assert steady.ttft > closed_loop(STEP, FULL, load("32768", "1024", 8)).ttft * 5
    with pytest.raises(LeanMoeError, match="does not fit the KV cache"):
        closed_loop(STEP, FULL, load("1000000", "1000000", 1))
    with pytest.raises(LeanMoeError, match="does not fit the KV cache"):
        simulate(STEP, FULL, load("1000000", "1000000", 1))
