"""A curve keeps its points and goes on; what a plan's bands and prompt rules activate."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import published_shape
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.experts.curves import Activation, from_points
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import Parts, StepBatch, StepTime

H200 = GPUS["h200"]


V3 = published_shape("deepseek-ai/DeepSeek-V3")


QWEN = published_shape("Qwen/Qwen3-30B-A3B")


def parts(
    place: Deployment, batch: StepBatch, plan: Plan | None = None, model: MoEShape = V3
) -> Parts:
    step = StepTime(model, place, shipped(), "sglang-triton" if model is V3 else "vllm-triton")
    return step.parts(batch, Activation(model, plan, assumed_curves(model, Assumed())))


def test_prompt_rules_spare_prompt_tokens_alone() -> None:
    place, layers = Deployment(H200, 8), len(V3.moe_layers)
    plan = Plan.banded(V3.fingerprint(), (), (Rule(top_k=2),) * layers)
    batch = StepBatch(16, 1000, prompt=4096)
    assert parts(place, batch, plan).experts < 0.7 * parts(place, batch).experts
    decode = StepBatch(16, 1000)
    assert parts(place, decode, plan).experts == pytest.approx(parts(place, decode).experts)


def test_a_band_ends_where_it_says() -> None:
    place, layers = Deployment(H200, 8), len(V3.moe_layers)
    plan = Plan.banded(V3.fingerprint(), (Band(32, (Rule(top_k=2),) * layers),))
    assert parts(place, StepBatch(32, 100), plan).experts < parts(place, StepBatch(32, 100)).experts
    assert (
        parts(place, StepBatch(33, 100), plan).experts == parts(place, StepBatch(33, 100)).experts
    )


def test_prompt_tokens_join_a_step_that_is_shared() -> None:
    layers = len(QWEN.moe_layers)
    bands = Plan.uniform(QWEN.fingerprint(), Rule(guaranteed=3)).bands
    plan = Plan.banded(QWEN.fingerprint(), bands, prompt=(Rule(),) * layers)
    curves = assumed_curves(QWEN, Assumed())
    (active,) = Activation(QWEN, plan, curves).layers(2, 1)
    assert active.is_shared
    (alone,) = Activation(QWEN, None, curves).layers(2, 1)
    assert not alone.is_shared


def test_a_measured_curve_is_kept_and_goes_on_beyond_its_last_point() -> None:
    curve = from_points([(1, 8, 8), (16, 60, 8), (4, 28, 8)], 64, "measured")
    assert curve.at(4) == (28, 8)
    assert 28 < curve.at(8)[0] < 60
    assert 60 < curve.at(64)[0] <= 64
    with pytest.raises(LeanMoeError, match="at least one point"):
        from_points([], 64, "measured")
