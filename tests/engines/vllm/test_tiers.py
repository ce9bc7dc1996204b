"""Tiers in vLLM itself: unknown ones, cached blocks that stay apart, and what a step is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.serve.plugin_options import PluginOptions

MODEL = read_shape("reference").fingerprint()
PLAN = Plan.uniform(MODEL, Rule(top_k=2))
PROMPT = [(17 * place + 5) % 900 + 40 for place in range(96)]
BLOCK = 32
CACHED = 2 * BLOCK
"""A prompt's whole blocks but the last, which has the token that is predicted from."""
KEEPS = {"enable_prefix_caching": True, "block_size": BLOCK}


@pytest.fixture
def serve(load: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Loads the reference model under a plan with tiers."""
    from leanmoe.serve.vllm.control_hooks import process_control

    def start(plan: Plan, **settings: Any) -> Any:
        plan.save(tmp_path / "plan.json")
        process_control().start(PluginOptions(str(tmp_path / "plan.json"), tiers=True))
        return load(plan, **{**KEEPS, **settings})

    yield start
    process_control().stop()


def reply(llm: Any, tier: str | None, salt: str | None = None) -> Any:
    from vllm import SamplingParams

    asked = None if tier is None else {"leanmoe_tier": tier}
    parameters = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, extra_args=asked
    )
    prompt: dict[str, Any] = {"prompt_token_ids": PROMPT}
    if salt is not None:
        prompt["cache_salt"] = salt
    return llm.generate([prompt], parameters, use_tqdm=False)[0]


def likelihoods(found: Any) -> list[float]:
    (output,) = found.outputs
    return [
        step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)
    ]


def test_cached_blocks_are_not_read_by_another_tier(serve: Callable[..., Any]) -> None:
    llm = serve(PLAN)
    fresh = reply(llm, "strict")
    assert fresh.num_cached_tokens == 0
    llm = serve(PLAN)
    economy = reply(llm, None)
    assert economy.num_cached_tokens == 0
    assert reply(llm, "lean").num_cached_tokens == CACHED, "it is the server's own tier"
    strict = reply(llm, "strict")
    assert strict.num_cached_tokens == 0, "those blocks were made with fewer experts"
    # Every layer of every step is the same, so what is left is how sums are rounded.
    assert likelihoods(strict) == pytest.approx(likelihoods(fresh), abs=1e-5)
    again = reply(llm, "strict")
    assert again.num_cached_tokens == CACHED
    assert likelihoods(again) == pytest.approx(likelihoods(fresh), abs=1e-5)
    assert reply(llm, "full").num_cached_tokens == 0
    assert reply(llm, None, salt="mine").num_cached_tokens == 0


def test_what_cannot_be_served_is_refused_as_it_comes(serve: Callable[..., Any]) -> None:
    llm = serve(PLAN)
    with pytest.raises(ValueError, match="leanmoe_tier is 'economy': it must be one of strict"):
        reply(llm, "economy")
    with pytest.raises(ValueError, match="cache_salt"):
        reply(llm, None, salt="leanmoe-0")
    assert len(reply(llm, None).outputs[0].token_ids) == 8, "it serves on"


def test_each_step_is_told_what_it_runs_under(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from leanmoe.serve.vllm.control_hooks import process_control

    llm = serve(PLAN)
    heard: list[Any] = []
    stock = GPUModelRunner.execute_model

    def execute(self: Any, scheduled: Any, *more: Any, **others: Any) -> Any:
        if scheduled.total_num_scheduled_tokens:
            heard.append(scheduled.leanmoe)
        return stock(self, scheduled, *more, **others)

    monkeypatch.setattr(GPUModelRunner, "execute_model", execute)
    reply(llm, None)
    reply(llm, "strict")
    assert set(heard) == {(0, 0)}
    engine = process_control().engine
    assert engine is not None
    state = engine.state()
    assert state["reply_tokens"] == {"lean": 8, "strict": 8}
    assert state["degraded_tokens"] == {}
    with pytest.raises(LeanMoeError, match="'best' is not known"):
        engine.change_plan("best")
