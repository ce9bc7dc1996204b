"""Tiers in vLLM itself: several in one batch, cached blocks that stay apart, load, other plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Level, Plan, Rule
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.tiers import StepChoice

MODEL = read_shape("reference").fingerprint()


def level(name: str, top_k: int, *prompt: Rule) -> Level:
    return Level(name, (Band(None, (Rule(top_k=top_k),) * MODEL.moe_layers),), prompt)


PLAN = Plan(MODEL, (level("careful", 5), level("fast", 2, *(Rule(top_k=3),) * MODEL.moe_layers)))
OTHER = Plan(MODEL, (level("careful", 4), level("fast", 1)))
PROMPT = [(17 * place + 5) % 360 + 40 for place in range(96)]
BLOCK = 32
CACHED = 2 * BLOCK
"""A prompt's whole blocks but the last, which has the token that is predicted from."""
Serve = Callable[..., Any]


@pytest.fixture
def serve(load: Callable[..., Any], tmp_path: Path) -> Serve:
    """Loads the reference model under plans with tiers."""

    def start(*plans: Plan, **options: Any) -> Any:
        paths = [tmp_path / f"{'ab'[number]}.json" for number in range(len(plans))]
        for plan, path in zip(plans, paths, strict=True):
            plan.save(path)
        given = PluginOptions(
            ",".join(map(str, paths)), collect_stats=True, check_rows=True, tiers=True, **options
        )
        return load(options=given, enable_prefix_caching=True, block_size=BLOCK)

    return start


def replies(llm: Any, *tiers: str | None, salt: str | None = None, tokens: int = 8) -> list[Any]:
    """The same prompt under each of the tiers, in one batch."""
    from vllm import SamplingParams

    asked = [None if tier is None else {"leanmoe_tier": tier} for tier in tiers]
    parameters = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, extra_args=one
        )
        for one in asked
    ]
    prompt: dict[str, Any] = {"prompt_token_ids": PROMPT}
    if salt is not None:
        prompt["cache_salt"] = salt
    found: list[Any] = llm.generate([prompt] * len(tiers), parameters, use_tqdm=False)
    return found


def likelihoods(found: Any) -> list[float]:
    """Of a reply's own tokens."""
    (output,) = found.outputs
    steps = zip(output.logprobs, output.token_ids, strict=True)
    return [step[token].logprob for step, token in steps]


def same(wanted: list[float]) -> Any:
    return pytest.approx(wanted, abs=1e-4)


def cached(found: Any) -> int:
    return int(found.num_cached_tokens)


def engine() -> Any:
    from leanmoe.serve.vllm.control_hooks import process_control

    found = process_control().engine
    assert found is not None
    return found


def test_tiers_in_one_batch_are_each_as_it_would_be_alone(
    load: Callable[..., Any], serve: Serve
) -> None:
    """A rule of a token alone has no neighbours: strict is the model, a level is its own plan."""
    alone = {"strict": likelihoods(replies(load(None), None)[0])}
    for one in PLAN.levels:
        plan = Plan(MODEL, (one,))
        alone[one.name] = likelihoods(replies(load(plan), None)[0])
    assert alone["strict"] != same(alone["careful"])
    assert alone["careful"] != same(alone["fast"])
    found = replies(serve(PLAN), "strict", "fast", None, "careful", "full")
    for tier, one in zip(("strict", "fast", "careful", "careful", "strict"), found, strict=True):
        assert likelihoods(one) == same(alone[tier]), tier


def test_cached_blocks_are_not_read_by_another_tier(load: Callable[..., Any], serve: Serve) -> None:
    fresh = likelihoods(replies(load(None), None)[0])
    llm = serve(PLAN)
    for tier in ("fast", None):
        assert cached(replies(llm, tier)[0]) == 0
        assert cached(replies(llm, tier)[0]) == CACHED
    assert cached(replies(llm, "careful")[0]) == CACHED, "it is the server's own tier"
    (strict,) = replies(llm, "strict")
    assert cached(strict) == 0, "those blocks were made with fewer experts"
    assert likelihoods(strict) == same(fresh)
    (again,) = replies(llm, "strict")
    assert cached(again) == CACHED
    assert likelihoods(again) == same(fresh)
    assert cached(replies(llm, "full")[0]) == 0
    assert cached(replies(llm, None, salt="mine")[0]) == 0


def test_what_cannot_be_served_is_refused_as_it_comes(serve: Serve) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = serve(PLAN)
    with pytest.raises(
        VLLMValidationError, match="leanmoe_tier is 'economy': it must be one of strict"
    ):
        replies(llm, "economy")
    with pytest.raises(VLLMValidationError, match="cache_salt"):
        replies(llm, None, salt="leanmoe-0")
    assert len(replies(llm, None)[0].outputs[0].token_ids) == 8, "it serves on"


def test_load_makes_replies_faster_and_leaves_prompts_and_strict_alone(
    load: Callable[..., Any], serve: Serve
) -> None:
    alone = likelihoods(replies(load(None), None)[0])
    careful = likelihoods(replies(load(Plan(MODEL, PLAN.levels[:1])), None)[0])
    llm = serve(PLAN, slo="tpot=1us")
    engine()._choice = StepChoice(level=2)
    own, strict = replies(llm, None, "strict", tokens=8)
    assert likelihoods(strict) == same(alone)
    assert likelihoods(own) != same(careful)
    state = engine().state()
    assert state["reply_tokens"] == {"careful": 8, "strict": 8}
    assert state["degraded_tokens"] == {"careful": 8}


def test_a_plan_is_changed_between_two_tokens(load: Callable[..., Any], serve: Serve) -> None:
    other = likelihoods(replies(load(Plan(MODEL, OTHER.levels[:1])), None)[0])
    llm = serve(PLAN, OTHER)
    before = replies(llm, None)[0]
    assert engine().change_plan("b")["epoch"] == 1
    after = replies(llm, None)[0]
    assert cached(after) == 0, "blocks of the plan before are not read"
    assert likelihoods(after) == same(other)
    assert likelihoods(before) != same(other)
    with pytest.raises(LeanMoeError, match="'c' is not known"):
        engine().change_plan("c")
    assert engine().change_plan("a")["epoch"] == 2
    assert likelihoods(replies(llm, None)[0]) == same(likelihoods(before))
