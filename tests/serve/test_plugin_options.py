"""Which parts of a plan an engine runs, which it refuses, and what it says of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Level, Plan, Rule
from leanmoe.serve.plugin_options import (
    LEANMOE,
    VARIABLES,
    VLLM,
    PluginOptions,
    check_batch_scope,
    check_parts,
    is_plain,
    notes,
    plan_names,
    plan_paths,
    without,
)

QWEN = Fingerprint("Qwen3MoeForCausalLM", 48, 2, 128, 8)
SIX = Plan.uniform(QWEN, Rule(top_k=6))
SHARED = Plan.banded(
    QWEN, (Band(30, (Rule(guaranteed=3),) * 2), Band(None, (Rule(), Rule(top_k=6))))
)
PROMPT = Plan.banded(QWEN, SHARED.bands, (Rule(top_k=2), Rule()))


def test_only_prompt_rules_can_be_dropped() -> None:
    assert without(PROMPT, ["prompt"]) == SHARED
    assert without(PROMPT, []) == PROMPT
    with pytest.raises(LeanMoeError, match="cannot drop 'bands'"):
        without(SIX, ["bands"])


def test_a_part_that_an_engine_cannot_run_is_refused_by_name() -> None:
    check_parts(SHARED, "SGLang", "nothing")
    refused = r"SGLang: rules for prompt tokens .*; --drop prompt runs"
    with pytest.raises(LeanMoeError, match=refused):
        check_parts(PROMPT, "SGLang", "--drop prompt")
    check_parts(PROMPT, "vLLM", "nothing")
    placed = Plan.uniform(QWEN, Rule(budget_per_rank=6))
    check_parts(placed, "vLLM", "nothing")
    with pytest.raises(LeanMoeError, match="SGLang: budget_per_rank cannot run"):
        check_parts(placed, "SGLang", "nothing")


def test_a_rule_of_top_k_alone_is_an_engines_own_routing() -> None:
    assert is_plain(Rule())
    assert is_plain(Rule(top_k=2))
    assert not is_plain(Rule(top_k=2, renormalise=0.0))
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
    assert any("0.26 and newer spare its row" in note for note in notes(SHARED, "vLLM"))
    assert any("its Triton experts spare its row" in note for note in notes(SHARED, "SGLang"))
    assert any("make 30 capture sizes" in note for note in notes(SHARED, "vLLM"))
    assert not any("capture sizes" in note for note in notes(SHARED, "SGLang"))
    assert not notes(SIX, "vLLM")


def test_a_batch_aware_plan_is_said_to_see_one_rank() -> None:
    (vllm,) = [note for note in notes(SHARED, "vLLM") if "data-parallel rank" in note]
    (sglang,) = [note for note in notes(SHARED, "SGLang") if "data-parallel rank" in note]
    assert "LEANMOE_BATCH_SCOPE=all" in vllm
    assert "LEANMOE_BATCH_SCOPE" not in sglang


MODEL = Fingerprint("Model", 1, 1, 8, 2)


def read(engine: str = "vLLM", **values: str) -> PluginOptions | None:
    """The options under LEANMOE_PLAN and these variables, named without LEANMOE_."""
    environ = {f"LEANMOE_{name}": value for name, value in values.items()}
    return PluginOptions.from_environ(engine, {"LEANMOE_PLAN": "plan.json", **environ})


def test_without_a_plan_nothing_is_asked_for_or_refused() -> None:
    assert PluginOptions.from_environ("vLLM", {}) is None
    assert PluginOptions.from_environ("vLLM", {"LEANMOE_BATCH_SCOPE": "world"}) is None
    assert read(PLAN="") is None


def test_what_is_not_set_or_empty_is_the_default() -> None:
    assert read() == PluginOptions("plan.json")
    assert read(DROP="", BATCH_SCOPE="", EXPERTS="", STATISTICS="") == PluginOptions("plan.json")
    assert read(BATCH_SCOPE="rank", STATISTICS="0") == PluginOptions("plan.json")
    assert read(LEVEL="") == PluginOptions("plan.json")


def test_every_variable_of_the_plugin_is_read() -> None:
    options = read(
        DROP="prompt, other", BATCH_SCOPE="all", EXPERTS="leanmoe", STATISTICS="1", CHECK_ROWS="1"
    )
    assert options == PluginOptions("plan.json", ("prompt", "other"), True, True, True, LEANMOE)
    assert read(EXPERTS="vllm") == PluginOptions("plan.json", experts=VLLM)
    assert read(LEVEL="1%") == PluginOptions("plan.json", level="1%")
    options = read(TIERS="1", SLO="tpot=30ms")
    assert options == PluginOptions("plan.json", tiers=True, slo="tpot=30ms")
    assert len(VARIABLES) == 12, "the two others are not the plugin's"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BATCH_SCOPE", "world", "LEANMOE_BATCH_SCOPE is 'world': it must be rank or all"),
        ("EXPERTS", "fast", "LEANMOE_EXPERTS is 'fast': it must be vllm or leanmoe"),
        ("STATISTICS", "yes", "LEANMOE_STATISTICS is 'yes': it must be 0 or 1"),
        ("TIERS", "all", "LEANMOE_TIERS is 'all': it must be 0 or 1"),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        read(**{name: value})


def test_what_an_engine_cannot_do_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="LEANMOE_BATCH_SCOPE is 'all': SGLang cannot"):
        read("SGLang", BATCH_SCOPE="all")
    with pytest.raises(LeanMoeError, match="leanmoe's kernels cannot run in SGLang"):
        read("SGLang", EXPERTS="leanmoe")
    with pytest.raises(LeanMoeError, match="SGLang serves one level of one plan"):
        read("SGLang", SLO="tpot=30ms")


def test_of_several_levels_one_is_read(tmp_path: Path) -> None:
    path, levels = tmp_path / "plan.json", (Level("0.2%", SIX.bands), Level("1%", SHARED.bands))
    Plan(QWEN, levels).save(path)
    with pytest.raises(LeanMoeError, match=r"has the levels 0\.2%, 1%: choose one.*LEANMOE_LEVEL"):
        PluginOptions(str(path)).load_plan("SGLang")
    assert PluginOptions(str(path), level="1%").load_plan("SGLang").level == levels[1]


def test_a_plan_is_read_less_what_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan.banded(MODEL, prompt=(Rule(top_k=1),)).save(path)
    with pytest.raises(LeanMoeError, match="LEANMOE_DROP=prompt runs the bands without them"):
        PluginOptions(str(path)).load_plan("SGLang")
    assert PluginOptions(str(path), ("prompt",)).load_plan("SGLang") == Plan.banded(MODEL)
    assert PluginOptions(str(path)).load_plan("vLLM").prompt


def test_several_plans_are_named_with_commas() -> None:
    assert plan_paths("a.json, b.json") == [Path("a.json"), Path("b.json")]
    with pytest.raises(LeanMoeError, match=r"a\.json is given twice"):
        plan_paths("a.json,a.json")
    assert plan_names("x/a.json,b.json") == ("a", "b")
    with pytest.raises(LeanMoeError, match="two plans are called a: give their files"):
        plan_names("x/a.json,y/a.json")


def test_tiers_are_asked_for_or_follow_from_what_needs_them() -> None:
    assert not PluginOptions("a.json", level="fast").has_tiers
    assert PluginOptions("a.json", tiers=True).has_tiers
    assert PluginOptions("a.json", slo="tpot=30ms").has_tiers
    assert PluginOptions("a.json,b.json").has_tiers
