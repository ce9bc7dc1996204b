"""Replies: those of the model alone, and what is said of them."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan, Rule
from leanmoe.runtime import apply, shape_of
from leanmoe.scoring.rows import ScoredRow, ScoringSetup
from leanmoe.scoring.writing import divergence_by_position, end_tokens, write_on
from leanmoe.stats.replies import (
    NUMBER,
    answer_in,
    compiled,
    first_divergence,
    pass_at,
    repeated_share,
    until,
)
from tests.runtime.families import build

PROMPTS = [(1, 5, 9), (1, 7), (1, 3, 4, 8, 2), (1, 60), (1, 5, 5, 5, 5, 5, 6)]


def under(model: Any, rule: Rule, decode_batch: int = 1, seed: int = 0) -> ScoringSetup:
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)

    def applying(prompt: int) -> Any:
        return apply(model, plan, decode_batch=decode_batch, prompt_tokens=prompt)

    return ScoringSetup(model, applying, decode_batch, seed)


@torch.inference_mode()
def by_hand(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rule", [Rule(), Rule(top_k=1)])
def test_greedy_replies_are_those_of_each_prompt_alone(rule: Rule) -> None:
    model = build("qwen3_moe")
    with apply(model, Plan.uniform(shape_of(model).fingerprint(), rule)):
        wanted = [by_hand(model, prompt, 6) for prompt in PROMPTS]
    assert write_on(under(model, rule, 2, 3), PROMPTS, 6, "x") == wanted


def test_a_call_stops_once_all_its_replies_have_ended() -> None:
    model = build("qwen3_moe")
    whole = write_on(under(model, Rule()), PROMPTS, 6, "x")
    ends = frozenset(reply[1] for reply in whole)
    cut = write_on(under(model, Rule()), PROMPTS, 6, "x", ends=ends)
    assert len(cut[0]) == 2
    assert cut == [reply[:2] for reply in whole]
    assert write_on(under(model, Rule()), PROMPTS, 6, "x", ends=frozenset({-1})) == whole


def test_end_tokens_are_those_of_the_generation_settings() -> None:
    model = build("qwen3_moe")
    for value, wanted in ((None, set()), (7, {7}), ([7, 2], {2, 7})):
        model.generation_config.eos_token_id = value
        assert end_tokens(model) == wanted


def test_company_changes_replies_only_under_rules_that_look_at_it() -> None:
    model = build("deepseek_v3")
    prompts = [(1, n, n + 1) for n in range(2, 26)]
    alone = [write_on(under(model, Rule(top_k=1), 8, seed), prompts, 8, "x") for seed in (0, 1)]
    assert alone[0] == alone[1]


def test_draws_depend_on_prompt_and_position_alone() -> None:
    model = build("qwen3_moe")
    how: dict[str, Any] = {"temperature": 1.0, "draws": 4}
    first = write_on(under(model, Rule()), PROMPTS, 5, "x", **how)
    again = write_on(under(model, Rule(), 5, 9), PROMPTS, 5, "x", **how)
    assert first == again
    assert first != write_on(under(model, Rule()), PROMPTS, 5, "x", temperature=1.0, draws=5)


def test_draws_are_from_the_models_distribution() -> None:
    model = build("qwen3_moe")
    prompts = [(1, 9, 4)] * 1500
    drawn = write_on(under(model, Rule()), prompts, 1, "x", temperature=0.7)
    with torch.inference_mode():
        wanted = (model(torch.tensor([[1, 9, 4]])).logits[0, -1].double() / 0.7).softmax(-1)
    counts = np.bincount([reply[0] for reply in drawn], minlength=len(wanted))
    expected = wanted.numpy() * len(prompts)
    often = expected > 8
    chi = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    assert chi < often.sum() + 5 * np.sqrt(2 * often.sum())


def test_divergence_by_position_is_that_of_the_logits() -> None:
    model = build("deepseek_v3")
    rows = [ScoredRow((*prompt, 7, 8, 9, 10), len(prompt)) for prompt in PROMPTS]
    full, less = under(model, Rule()), under(model, Rule(top_k=1))
    found = divergence_by_position(full, less, rows, "x")
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=1))
    for row, kl_T in zip(rows, found, strict=True):
        ids = torch.tensor([row.ids])
        with torch.inference_mode():
            full_TV = model(ids).logits[0].double().log_softmax(-1)
            with apply(model, plan):
                less_TV = model(ids).logits[0].double().log_softmax(-1)
        wanted = (full_TV.exp() * (full_TV - less_TV)).sum(-1)[row.first - 1 : -1]
        assert kl_T == pytest.approx(wanted.numpy(), abs=1e-5)
    same = divergence_by_position(full, full, rows, "x")
    assert np.abs(same).max() < 1e-6


def test_what_cannot_be_written() -> None:
    model = build("qwen3_moe")
    setup = ScoringSetup(model, lambda _: nullcontext())
    with pytest.raises(LeanMoeError, match="there are 2 prompts, too few"):
        write_on(ScoringSetup(model, lambda _: nullcontext(), 3), PROMPTS[:2], 4, "x")
    with pytest.raises(LeanMoeError, match="no token"):
        write_on(setup, [()], 4, "x")
    with pytest.raises(LeanMoeError, match="reads at most"):
        write_on(setup, PROMPTS, 10**6, "x")


def test_pass_at_is_the_share_of_draws_with_a_right_one() -> None:
    for count in range(1, 7):
        for right in range(count + 1):
            for tries in range(1, count + 1):
                drawn = list(combinations(range(count), tries))
                share = sum(min(each) < right for each in drawn) / len(drawn)
                assert pass_at(count, right, tries) == pytest.approx(share)
    with pytest.raises(LeanMoeError, match="does not exist"):
        pass_at(3, 1, 4)


def test_replies_are_compared_by_tokens() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    assert until([4, 5, 0, 6], frozenset({0})) == [4, 5]
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)


def test_answers_are_the_last_that_the_pattern_finds() -> None:
    assert answer_in("so 12 eggs and #### 1,234", compiled(NUMBER)) == "1234"
    assert answer_in("it is -3.5.", compiled(NUMBER)) == "-3.5"
    assert answer_in("none", compiled(NUMBER)) is None
    assert answer_in("A: B) then", compiled(r"([A-Z])\)")) == "B"
    with pytest.raises(LeanMoeError, match="no regular expression"):
        compiled("(")
