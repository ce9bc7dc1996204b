"""A step of a whole model: what fits, what it is made of, and readings of real ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import CONFIGS, published_shape
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.active_experts import Activation
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves, saved_curves
from leanmoe.predict.hardware.gpus import GPUS, Gpu, read_gpu, to_json
from leanmoe.predict.kernels.small_steps import SmallSteps
from leanmoe.predict.kernels.tables import VERSION, installed
from leanmoe.predict.prediction import bounds
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import Parts, StepBatch, StepTime
from tests.profile.example import profile
from tests.published import MODELS

H200 = GPUS["h200"]
V3 = published_shape("deepseek-ai/DeepSeek-V3")
QWEN = published_shape("Qwen/Qwen3-30B-A3B")
READINGS = Path(__file__).parents[3] / "benchmarks/predict/data/readings"


def parts(
    place: Deployment, batch: StepBatch, plan: Plan | None = None, model: MoEShape = V3
) -> Parts:
    step = StepTime(model, place, shipped(), "sglang-triton" if model is V3 else "vllm-triton")
    return step.parts(batch, Activation(model, plan, assumed_curves(model, Assumed())))


def test_what_a_token_leaves_in_the_cache() -> None:
    assert V3.cached_bytes(1) == 61 * (512 + 64) * 2
    assert V3.cached_bytes(100, tensor=8) == 100 * V3.cached_bytes(1)  # a latent is on every GPU
    assert QWEN.cached_bytes(1) == 48 * 2 * 4 * 128 * 2
    assert QWEN.cached_bytes(1, tensor=4) == QWEN.cached_bytes(1) / 4
    oss = published_shape("openai/gpt-oss-120b")
    assert {kind.window for kind, _ in oss.attention} == {128, None}
    assert oss.cached_bytes(1000) < 1000 * oss.cached_bytes(1)


def test_a_hybrid_models_linear_layers_cache_nothing() -> None:
    found = read_shape(MODELS["Qwen/Qwen3-Next-80B-A3B-Instruct"].config)
    assert sum(count for _, count in found.attention) == 12
    nemotron = read_shape(MODELS["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B"].config)
    assert (sum(count for _, count in nemotron.attention), nemotron.matrices) == (6, 2)


def test_weights_on_all_gpus_are_the_models() -> None:
    whole = V3.always_bytes() + V3.parameters.embedding * 2
    whole += len(V3.moe_layers) * V3.experts * V3.expert_bytes
    # Latent attention's down-projections are on every GPU: 7,168 x (1,536 + 576) a layer, fp8.
    copied = 61 * 7168 * (1536 + 576)
    assert V3.copied_weights == copied
    everywhere = whole + 7 * copied * V3.storage.other_bytes
    assert Deployment(H200, 8).weight_bytes(V3) * 8 == pytest.approx(everywhere, rel=0.005)
    assert Deployment(H200, 1, 8, 8).weight_bytes(V3) > Deployment(H200, 8).weight_bytes(V3)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (Deployment(H200, 4), r"does not fit 4 x h200.*GB short in all"),
        (Deployment(H200, 3), r"--tensor-parallel-size 3 does not divide 128 attention heads"),
        (Deployment(H200, 8, expert=3), r"--expert-parallel-size 3 does not divide 8 GPUs"),
        (Deployment(H200, 8, pipeline=80), r"more than the model's 61 layers"),
        (Deployment(H200, 0), r"--tensor-parallel-size is 0"),
        (Deployment(H200, 8, data=4096), r"at most 16384"),
    ],
)
def test_what_cannot_be_deployed(place: Deployment, says: str) -> None:
    with pytest.raises(LeanMoeError, match=says):  # noqa: PT012, either may refuse
        place.check(V3)
        place.memory(V3)


def test_hardware_by_name_or_by_file(tmp_path: Path) -> None:
    assert read_gpu("H200") == H200
    with pytest.raises(
        LeanMoeError, match=r"hardware 'h20o' is not known: did you mean.*known are"
    ):
        read_gpu("h20o")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**to_json(H200), "name": "mine"}))
    assert read_gpu(str(path)) == Gpu(**{**asdict(H200), "name": "mine"})
    for change, says in (
        ({"bandwidth": -1}, "bandwidth is -1: it must be above 0"),
        ({"bandwith": 1}, "unknown field 'bandwith'"),
        ({"name": ""}, "name is ''"),
    ):
        path.write_text(json.dumps({**to_json(H200), **change}))
        with pytest.raises(LeanMoeError, match=says):
            read_gpu(str(path))


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


def test_prompt_rules_spare_prompt_tokens_alone() -> None:
    place, layers = Deployment(H200, 8), len(V3.moe_layers)
    plan = Plan(V3.fingerprint(), (), (Rule(top_k=2),) * layers)
    batch = StepBatch(16, 1000, prompt=4096)
    assert parts(place, batch, plan).experts < 0.7 * parts(place, batch).experts
    decode = StepBatch(16, 1000)
    assert parts(place, decode, plan).experts == pytest.approx(parts(place, decode).experts)


def test_a_band_ends_where_it_says() -> None:
    place, layers = Deployment(H200, 8), len(V3.moe_layers)
    plan = Plan(V3.fingerprint(), (Band(32, (Rule(top_k=2),) * layers),))
    assert parts(place, StepBatch(32, 100), plan).experts < parts(place, StepBatch(32, 100)).experts
    assert (
        parts(place, StepBatch(33, 100), plan).experts == parts(place, StepBatch(33, 100)).experts
    )


def test_what_bounds_a_part() -> None:
    step = StepTime(QWEN, Deployment(H200), shipped(), "vllm-triton")
    activation = Activation(QWEN, None, assumed_curves(QWEN, Assumed()))
    few = bounds(step, StepBatch(16, 20_000), activation)
    assert few["attention"] == few["experts"] == few["head"] == "memory"
    assert few["layers"] == "latency"
    many = bounds(step, StepBatch(0, 0, prompt=16384), activation)
    assert many["attention"] == many["projections"] == "compute"


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


def test_prompt_tokens_join_a_step_that_is_shared() -> None:
    layers = len(QWEN.moe_layers)
    bands = Plan.uniform(QWEN.fingerprint(), Rule(guaranteed=3)).bands
    plan = Plan(QWEN.fingerprint(), bands, prompt=(Rule(),) * layers)
    curves = assumed_curves(QWEN, Assumed())
    (active,) = Activation(QWEN, plan, curves).layers(2, 1)
    assert active.is_shared
    (alone,) = Activation(QWEN, None, curves).layers(2, 1)
    assert not alone.is_shared


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


def test_a_saved_profiles_curve_needs_no_torch_and_its_own_model() -> None:
    saved = profile(alike=1.0)
    with pytest.raises(LeanMoeError, match="the profile is of another model"):
        saved_curves({"model": asdict(saved.model), "profile": saved.to_json()}, V3)
    config = {
        **CONFIGS["Qwen/Qwen3-30B-A3B"],
        "architectures": [saved.model.architecture],
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    model = read_shape(config)
    curve_of = saved_curves({"model": asdict(saved.model), "profile": saved.to_json()}, model)
    full = curve_of(0, Rule())
    for point in saved.distinct[0]:
        assert full.at(point.tokens)[0] == pytest.approx(point.measured)
    lower = curve_of(0, Rule(top_k=2))
    assert all(lower.at(n)[0] < full.at(n)[0] for n in (2, 8, 32))
    assert "measured" in full.origin
    with pytest.raises(LeanMoeError, match="traces replayed"):
        curve_of(0, Rule(guaranteed=1))


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
