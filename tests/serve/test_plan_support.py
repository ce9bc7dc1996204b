"""Which parts of a plan an engine runs, which it refuses, and what it says of the rest."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.serve.plan_support import check_batch_scope, check_parts, is_plain, notes, without

QWEN = Fingerprint("Qwen3MoeForCausalLM", 48, 2, 128, 8)
SIX = Plan.uniform(QWEN, Rule(top_k=6))
SHARED = Plan(QWEN, (Band(30, (Rule(guaranteed=3),) * 2), Band(None, (Rule(), Rule(top_k=6)))))
PROMPT = Plan(QWEN, SHARED.bands, (Rule(top_k=2), Rule()))


def test_only_prompt_rules_can_be_dropped() -> None:
    assert without(PROMPT, ["prompt"]) == SHARED
    assert without(PROMPT, []) == PROMPT
    with pytest.raises(LeanMoeError, match="cannot drop 'bands'"):
        without(SIX, ["bands"])


def test_a_part_that_an_engine_cannot_run_is_refused_by_name() -> None:
    check_parts(SHARED, "SGLang", "nothing")
    with pytest.raises(LeanMoeError, match=r"vLLM: rules for prompt tokens .*; --drop prompt runs"):
        check_parts(PROMPT, "vLLM", "--drop prompt")
    placed = Plan.uniform(QWEN, Rule(budget_per_rank=6))
    check_parts(placed, "vLLM", "nothing")
    with pytest.raises(LeanMoeError, match="SGLang: budget_per_rank cannot run"):
        check_parts(placed, "SGLang", "nothing")


def test_a_rule_of_top_k_alone_is_an_engines_own_routing() -> None:
    assert is_plain(Rule())
    assert is_plain(Rule(top_k=2))
    assert not is_plain(Rule(top_k=2, keep_weights=True))
    assert not is_plain(Rule(top_k=2, threshold=0.1))


def test_whose_tokens_share_experts_is_asked_for_by_name() -> None:
    check_batch_scope("rank", "vLLM")
    check_batch_scope("all", "vLLM")
    with pytest.raises(LeanMoeError, match="SGLang cannot share experts among data-parallel ranks"):
        check_batch_scope("all", "SGLang")
    with pytest.raises(
        LeanMoeError, match="LEANMOE_BATCH_SCOPE is 'world': it must be rank or all"
    ):
        check_batch_scope("world", "vLLM")


def test_notes_say_what_a_skipped_slot_costs() -> None:
    assert any("skipped slot" in note for note in notes(SHARED, "vLLM"))
    assert not notes(SIX, "vLLM")


def test_a_batch_aware_plan_is_said_to_see_one_rank() -> None:
    (vllm,) = [note for note in notes(SHARED, "vLLM") if "data-parallel rank" in note]
    (sglang,) = [note for note in notes(SHARED, "SGLang") if "data-parallel rank" in note]
    assert "LEANMOE_BATCH_SCOPE=all" in vllm
    assert "LEANMOE_BATCH_SCOPE" not in sglang
