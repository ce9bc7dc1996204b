"""Loads: lengths, the steady state, and the simulation that it must agree with."""

from __future__ import annotations

import pytest

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
