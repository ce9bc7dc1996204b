"""A step of a whole model: what fits, what it is made of, and readings of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.models.catalog import published_shape
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.small_steps import SmallSteps
from leanmoe.predict.kernels.tables import VERSION, installed
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import Parts, StepBatch, StepTime

H200 = GPUS["h200"]


V3 = published_shape("deepseek-ai/DeepSeek-V3")


QWEN = published_shape("Qwen/Qwen3-30B-A3B")


READINGS = Path(__file__).parents[3] / "benchmarks/predict/data/readings"


def parts(
    place: Deployment, batch: StepBatch, plan: Plan | None = None, model: MoEShape = V3
) -> Parts:
    step = StepTime(model, place, shipped(), "sglang-triton" if model is V3 else "vllm-triton")
    return step.parts(batch, Activation(model, plan, assumed_curves(model, Assumed())))


def test_more_work_takes_longer_and_lower_k_less() -> None:
    place = Deployment(H200, 8)
    lower = Plan.uniform(V3.fingerprint(), Rule(top_k=4))
    before = 0.0
    for tokens in (1, 8, 64, 512):
        full, fewer = (parts(place, StepBatch(tokens, 1000), plan) for plan in (None, lower))
        assert full.total > before
        assert fewer.experts < full.experts
        assert fewer.total - fewer.experts == pytest.approx(full.total - full.experts)
        before = full.total
    longer = parts(place, StepBatch(64, 8000))
    assert longer.attention > 2 * parts(place, StepBatch(64, 1000)).attention
    with_prompt = parts(place, StepBatch(64, 1000, prompt=2048, ending=1))
    assert with_prompt.total > parts(place, StepBatch(64, 1000)).total


def test_communication_follows_the_parallelism() -> None:
    batch = StepBatch(64, 1000)
    assert parts(Deployment(H200), StepBatch(8, 100), model=QWEN).communication == 0
    tensor = parts(Deployment(H200, 8), batch).communication
    spread = parts(Deployment(H200, 1, 8, 8), batch).communication
    across = parts(Deployment(H200, 8, 64, 8), batch).communication
    assert min(tensor, spread) > 0
    assert across > 2 * spread  # between nodes


def experts_ms(
    tokens: int, rule: Rule, small_steps: SmallSteps, place: Deployment, kernel: str = "vllm-triton"
) -> float:
    plan = Plan.uniform(QWEN.fingerprint(), rule)
    activation = Activation(QWEN, plan, assumed_curves(QWEN, Assumed()))
    step = StepTime(QWEN, place, shipped(), kernel, small_steps)
    return 1e3 * step.parts(StepBatch(tokens, 100), activation).experts


def test_small_steps_are_grouped_where_tokens_share_experts_and_else_skip() -> None:
    repeat, skip, group = SmallSteps.REPEAT, SmallSteps.SKIP, SmallSteps.GROUP
    one, shared = Deployment(GPUS["h100"]), Rule(guaranteed=3)

    def took(tokens: int, rule: Rule = shared, place: Deployment = one) -> list[float]:
        return [experts_ms(tokens, rule, how, place) for how in (repeat, skip, group)]

    repeated, skipped, grouped = took(1)  # nobody to share with
    assert grouped == skipped < repeated
    repeated, skipped, grouped = took(4)  # 32 slots, a quarter of 128 experts
    assert grouped < skipped
    assert skipped <= repeated
    for same in (took(5), took(4, Rule(top_k=6)), took(4, Rule())):  # not small; none shared
        assert len(set(same)) == 1
    # Where tokens are gathered from copies of attention, the plugin leaves small steps alone.
    _, _, grouped = took(4, place=Deployment(GPUS["h100"], tensor=1, data=2))
    assert grouped == experts_ms(4, shared, repeat, Deployment(GPUS["h100"], tensor=1, data=2))
    assert len({experts_ms(4, shared, how, one, "leanmoe") for how in SmallSteps}) == 1


@pytest.mark.parametrize("path", sorted(READINGS.glob("*.json")), ids=lambda path: path.stem)
def test_steps_of_vllm_are_within_a_tenth(path: Path) -> None:
    if installed() != VERSION:
        pytest.skip("aiconfigurator-core is not installed")
    found = json.loads(path.read_text())
    model = published_shape(found["model"])
    place = Deployment(GPUS[found["hardware"]])
    step = StepTime(model, place, shipped(), found["kernel"], SmallSteps.REPEAT)
    for row in found["rows"]:
        plan = Plan.uniform(model.fingerprint(), Rule(**row["rule"]))
        activation = Activation(model, plan, assumed_curves(model, Assumed()))
        took = step.parts(StepBatch(row["concurrency"], found["context"]), activation).total
        took = 1e3 * took + len(model.moe_layers) * row["layer_us"] * 1e-3
        assert took == pytest.approx(row["step_ms"], rel=0.1), row


def test_mxfp4_kernels_group_every_step() -> None:
    """OpenAI's, in vLLM: what an engine makes of steps slot by slot does not touch them."""
    model = published_shape("openai/gpt-oss-120b")
    plan = Plan.uniform(model.fingerprint(), Rule(guaranteed=2))
    activation = Activation(model, plan, assumed_curves(model, Assumed()))
    times = {
        StepTime(model, Deployment(H200), shipped(), "vllm-triton", how)
        .parts(StepBatch(4, 100), activation)
        .experts
        for how in SmallSteps
    }
    assert len(times) == 1
