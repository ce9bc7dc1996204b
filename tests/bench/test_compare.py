"""The interleaved comparer: its order, its prompts, and a run on the reference model."""

from __future__ import annotations

import random

import pytest

from leanmoe.bench.compare import Variant, compare, interleaved, same_prompts, warm_up
from leanmoe.bench.metrics import ClosedLoop
from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime import load_model


@pytest.fixture(scope="module")
def reference_model():
    return load_model("reference")


def test_compare_interleaves_and_orders_times(reference_model) -> None:
    from contextlib import nullcontext

    model, tokenizer = reference_model
    ids = tokenizer("import this " * 30)["input_ids"][:32]
    load = ClosedLoop(2, 16, 4, 4)
    variants = [Variant("one", nullcontext), Variant("other", nullcontext)]
    found = compare(model, same_prompts([ids[:16], ids[16:32]], load), load, variants, repeats=3)
    for runs in found.runs.values():
        assert len(runs) == 3
        assert all(run.output_throughput > 0 for run in runs)
    ratio = found.ratio("other")
    assert ratio.low <= ratio.median <= ratio.high
    stored = found.to_json()
    assert stored["variants"]["one"]["runs"] == [r.output_throughput for r in found.runs["one"]]


def test_a_short_prompt_is_refused_by_length() -> None:
    load = ClosedLoop(1, 16, 4, 1)
    with pytest.raises(LeanMoeError, match="a prompt of 3 tokens was given"):
        same_prompts([[1, 2, 3]], load)
    with pytest.raises(LeanMoeError, match="no prompt was given"):
        same_prompts([], load)


def test_every_repeat_runs_each_variant_that_still_takes_part() -> None:
    order = list(interleaved({"full": 8, "plan": 8, "stock": 2}, random.Random(0)))
    for repeat in range(8):
        names = sorted(name for number, name in order if number == repeat)
        assert names == ["full", "plan", "stock"][: 3 if repeat < 2 else 2]
    assert [number for number, _ in order] == sorted(number for number, _ in order)
    firsts = {next(n for r, n in order if r == repeat) for repeat in range(8)}
    assert len(firsts) > 1, "one order for all repeats favours whoever comes first"


def test_a_supply_of_the_same_prompts_takes_them_in_turn() -> None:
    load = ClosedLoop(2, 2, 3, 5)
    supply = same_prompts([[1, 2, 9], [3, 4]], load)
    assert [request.prompt for request in supply(0, 3)] == [(1, 2), (3, 4), (1, 2)]
    assert supply("warm", 2) == supply(1, 2)
    assert [request.output_tokens for request in warm_up(supply, 2)] == [3, 3]
