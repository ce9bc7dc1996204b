"""Prometheus' text of what a plan does in a service."""

from __future__ import annotations

from leanmoe.serve.metrics import TokenRate, counted_tokens, exposition

STEP = {
    "rows": 12,
    "band": 0,
    "up_to": 16,
    "layers": [{"distinct": 30, "activated": 4.5}, None, {"distinct": 8, "activated": 8.0}],
}


def test_every_gauge_is_named_and_labelled() -> None:
    text = exposition('a"plan', "vllm", STEP, 120.0)
    assert 'leanmoe_plan{plan="a\\"plan",engine="vllm"} 1' in text
    assert 'leanmoe_band{band="0",up_to="16"} 1' in text
    assert 'leanmoe_distinct_experts{layer="0"} 30' in text
    assert 'leanmoe_activated_experts{layer="2"} 8' in text
    assert 'layer="1"' not in text  # another pipeline stage's
    assert "leanmoe_generation_tokens_per_second 120" in text
    assert text.count("# TYPE") == 6


def test_nothing_ran_says_only_which_plan() -> None:
    assert exposition("p", "vllm", None, None).count("# TYPE") == 1
    assert 'band="full model"' in exposition("p", "vllm", {**STEP, "band": None}, None)


def test_the_rate_is_that_since_the_last_scrape() -> None:
    rate = TokenRate()
    assert rate.per_second(100, now=1.0) is None
    assert rate.per_second(150, now=3.0) == 25
    assert rate.per_second(0, now=4.0) == 0  # the engine was started anew


def test_counters_are_summed_over_labels() -> None:
    name = "vllm:generation_tokens_total"
    text = f'# HELP x\n{name}{{engine="0"}} 5.0\n{name}{{engine="1"}} 7\n'
    assert counted_tokens(text) == 12
