"""What bounds a step's parts, and how far off predictions have been."""

from __future__ import annotations

from functools import partial

import pytest

from leanmoe.models.catalog import published_shape
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.tables import VERSION, installed
from leanmoe.predict.prediction import Basis, bounds, default_kernel, predict
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepBatch, StepTime
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths

H200 = GPUS["h200"]


QWEN = published_shape("Qwen/Qwen3-30B-A3B")


def test_what_bounds_a_part() -> None:
    step = StepTime(QWEN, Deployment(H200), shipped(), "vllm-triton")
    activation = Activation(QWEN, None, assumed_curves(QWEN, Assumed()))
    few = bounds(step, StepBatch(16, 20_000), activation)
    assert few["attention"] == few["experts"] == few["head"] == "memory"
    assert few["layers"] == "latency"
    many = bounds(step, StepBatch(0, 0, prompt=16384), activation)
    assert many["attention"] == many["projections"] == "compute"


@pytest.mark.skipif(installed() != VERSION, reason="aiconfigurator-core is not installed")
def test_a_prediction_says_how_far_off_its_kind_has_been() -> None:
    model, lengths = published_shape("Qwen/Qwen3-30B-A3B"), read_lengths("64", "length")
    load = ServiceLoadModel(lengths, lengths, 4)
    said = {}
    for gpu in ("h200", "a800"):
        basis = Basis(default_kernel(model), partial(assumed_curves, model, Assumed()))
        found = predict(model, None, Deployment(GPUS[gpu]), load, basis)
        said[gpu] = found.stands_on["experts have been off by"]
        assert found.stands_on["experts"].startswith("interpolated") == (gpu == "h200")
    assert "each row from its layer's others" in said["h200"]
    assert "unseen half" in said["a800"]
    assert "others" not in said["a800"]
