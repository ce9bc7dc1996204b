"""Loads: lengths, the steady state, and the simulation that it must agree with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import published_shape
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.active_experts import Activation
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
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


@pytest.mark.parametrize(
    ("inputs", "outputs", "at_once"),
    [("1024", "256", 1), ("512", "512", 8), ("256:1024", "128:512", 32), ("1024", "1024", 200)],
)
def test_the_steady_state_and_the_simulation_agree(inputs: str, outputs: str, at_once: int) -> None:
    wanted = load(inputs, outputs, at_once)
    steady, run = closed_loop(STEP, FULL, wanted), simulate(STEP, FULL, wanted)
    assert run.output_throughput == pytest.approx(steady.output_throughput, rel=0.06)
    assert run.tpot["mean"] == pytest.approx(steady.tpot, rel=0.1)


def test_prompts_that_fill_every_step_are_what_replies_wait_for() -> None:
    wanted = load("8192", "16", 64)
    steady, run = closed_loop(STEP, FULL, wanted), simulate(STEP, FULL, wanted, requests=512)
    assert run.output_throughput == pytest.approx(steady.output_throughput, rel=0.12)


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
