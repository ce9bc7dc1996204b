"""Rows in bundles: scores are those of each row run alone, and whoever shares a step is real."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Plan, Rule
from leanmoe.runtime import apply, shape_of
from leanmoe.scoring.rows import Bundle, ScoredRow, ScoringSetup, bundled, calls, score_rows
from tests.runtime.families import build

VOCABULARY = 64


def some_rows(seed: int = 0) -> tuple[list[ScoredRow], list[int]]:
    """Questions with several answers, with none in common, with one answer, with no prompt."""
    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, VOCABULARY) for _ in range(count))

    rows: list[ScoredRow] = []
    questions: list[int] = []
    for question in range(12):
        prompt = ids(draw.choice((1, 1, 4, 9)))
        start = ids(draw.choice((0, 2)))
        for _ in range(draw.choice((1, 2, 4))):
            rows.append(ScoredRow((*prompt, *start, *ids(draw.randrange(1, 7))), len(prompt)))
            questions.append(question)
    rows += [rows[-1], ScoredRow(ids(7), 3), ScoredRow(ids(5), 4)]
    questions += [questions[-1], 99, 99]
    return rows, questions


@torch.inference_mode()
def alone(model: Any, row: ScoredRow) -> tuple[float, bool]:
    logits_TV = model(torch.tensor([row.ids])).logits[0].double()
    found = logits_TV.log_softmax(-1)[row.first - 1 : -1]
    targets = torch.tensor(row.ids[row.first :])
    greedy = bool((found.argmax(-1) == targets).all())
    return -float(found.gather(1, targets[:, None]).sum()), greedy


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("rule", [Rule(), Rule(top_k=1), Rule(threshold=0.6)])
def test_scores_are_those_of_each_row_alone(family: str, rule: Rule) -> None:
    model, (rows, questions) = build(family), some_rows()
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)
    with apply(model, plan):
        wanted = [alone(model, row) for row in rows]

    def applying(prompt: int) -> Any:
        return apply(model, plan, decode_batch=3, prompt_tokens=prompt)

    found = score_rows(ScoringSetup(model, applying, 3, 5), rows, questions, "x", 100)
    assert [score.nll for score in found] == pytest.approx([nll for nll, _ in wanted], abs=1e-4)
    assert [score.greedy for score in found] == [greedy for _, greedy in wanted]


def test_prompts_are_under_the_rules_for_prompts() -> None:
    model = build("deepseek_v3")
    rows, questions = some_rows(1)
    fingerprint = shape_of(model).fingerprint()
    rules = (Rule(top_k=1),) * fingerprint.moe_layers
    plan = Plan.banded(fingerprint, (Band(None, (Rule(),) * fingerprint.moe_layers),), rules)

    def applying(prompt: int) -> Any:
        return apply(model, plan, decode_batch=1, prompt_tokens=prompt)

    found = score_rows(ScoringSetup(model, applying), rows, questions, "x")
    for row, score in zip(rows, found, strict=True):
        with apply(model, plan, decode_batch=1, prompt_tokens=row.prompt):
            assert score.nll == pytest.approx(alone(model, row)[0], abs=1e-4)


def test_a_step_holds_one_token_of_each_neighbour_and_no_padding() -> None:
    model = build("deepseek_v3")
    rows, questions = some_rows(2)
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(guaranteed=1))
    slots = []

    class Counting:
        def __init__(self, prompt: int) -> None:
            self.context = apply(model, plan, decode_batch=4, prompt_tokens=prompt, count=True)

        def __enter__(self) -> None:
            self.applied = self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)
            slots.append(self.applied.generated[0].tokens)

    score_rows(ScoringSetup(model, Counting, 4), rows, questions, "x")
    every = calls(bundled(rows, questions), 4)
    assert sum(slots) == sum(bundle.decoded for call in every for bundle in call.bundles)


def test_company_depends_on_the_seed_and_is_of_other_questions() -> None:
    bundles = bundled([ScoredRow((1, n % 9, n), 2) for n in range(40)], range(40))
    batch_draws = [calls(bundles, 8, seed) for seed in range(3)]
    assert batch_draws[0] == calls(bundles, 8, 0)
    assert batch_draws[0] != batch_draws[1] != batch_draws[2]
    for mix in batch_draws:
        for call in mix:
            for start in range(0, len(call.bundles), 8):
                step = call.bundles[start : start + 8]
                assert len({bundle.numbers for bundle in step}) == 8
        scored = [b.numbers for c in mix for b, s in zip(c.bundles, c.scored, strict=True) if s]
        assert sorted(scored) == sorted(bundle.numbers for bundle in bundles)


def test_the_last_step_is_filled_with_questions_scored_elsewhere() -> None:
    bundles = bundled([ScoredRow((1, n, n)) for n in range(10)], range(10))
    (call,) = calls(bundles, 4)
    assert len(call.bundles) == 12
    assert call.scored.count(False) == 2


def test_calls_stay_within_their_tokens() -> None:
    draw = random.Random(0)
    bundles = [Bundle((n,), (ScoredRow((1,) * draw.randrange(2, 40)),), 1) for n in range(60)]
    bundles = list(bundled([b.rows[0] for b in bundles], range(60)))
    for call in calls(bundles, 2, batch_tokens=200):
        width = max(b.prompt for b in call.bundles) + max(b.decoded for b in call.bundles)
        assert width * len(call.bundles) <= 200 or len(call.bundles) == 2


def test_mistakes_name_the_answer() -> None:
    model = build("qwen3_moe")
    setup = ScoringSetup(model, lambda _: nullcontext())
    with pytest.raises(LeanMoeError, match="answer 1 has no token to predict"):
        score_rows(setup, [ScoredRow((1, 2)), ScoredRow((1,))], [0, 1], "x")
    with pytest.raises(LeanMoeError, match="3 questions"):
        calls(bundled([ScoredRow((1, 2))] * 3, range(3)), 4)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(LeanMoeError, match="not finite numbers in answer 0"):
        score_rows(setup, [ScoredRow((1, 2))], [0], "x")
