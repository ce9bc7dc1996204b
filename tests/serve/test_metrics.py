"""Prometheus' text of what a plan does in a service."""

from __future__ import annotations

from leanmoe.serve.metrics import exposition

STEP = {
    "rows": 12,
    "band": 0,
    "up_to": 16,
    "layers": [{"distinct": 30, "activated": 4.5}, None, {"distinct": 8, "activated": 8.0}],
}


def test_every_gauge_is_named_and_labelled() -> None:
    text = exposition('a"plan', "vllm", STEP, 120)
    assert 'leanmoe_plan{plan="a\\"plan",engine="vllm"} 1' in text
    assert 'leanmoe_band{band="0",up_to="16"} 1' in text
    assert 'leanmoe_distinct_experts{layer="0"} 30' in text
    assert 'leanmoe_activated_experts{layer="2"} 8' in text
    assert 'layer="1"' not in text  # another pipeline stage's
    assert "leanmoe_generation_tokens_total 120" in text
    assert text.count("# TYPE") == 6


def test_levels_and_tiers_are_counted() -> None:
    state = {
        "plan": "a", "epoch": 1, "level": "fast", "changes": 3,
        "reply_tokens": {"fast": 7, "strict": 2}, "degraded_tokens": {"fast": 5},
    }  # fmt: skip
    text = exposition("a.json", "vllm", None, control=state)
    for line in (
        'leanmoe_level{level="fast",plan="a"} 1', "leanmoe_level_changes_total 3",
        "leanmoe_plan_changes_total 1", 'leanmoe_reply_tokens_total{tier="strict"} 2',
        'leanmoe_degraded_tokens_total{tier="fast"} 5',
        "# TYPE leanmoe_reply_tokens_total counter", "# TYPE leanmoe_level gauge",
    ):  # fmt: skip
        assert f"{line}\n" in text


def test_nothing_ran_says_only_which_plan() -> None:
    assert exposition("p", "vllm", None).count("# TYPE") == 1
    assert 'band="full model"' in exposition("p", "vllm", {**STEP, "band": None})
