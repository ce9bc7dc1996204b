"""lm-evaluation-harness's tasks in vLLM: which rules are at work there."""

from __future__ import annotations

from leanmoe.eval.harness_vllm import every_step
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule


def test_in_vllm_the_services_rules_are_at_work_in_steps_of_any_size() -> None:
    fingerprint = read_shape("reference").fingerprint()
    rules = (Rule(top_k=3),) * fingerprint.moe_layers
    plan = every_step(Plan.banded(fingerprint, (Band(16, rules),)), 8)
    assert plan.rules_for(4096) == rules
    assert every_step(Plan(fingerprint), 8).is_empty
