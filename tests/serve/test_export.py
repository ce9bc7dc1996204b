"""What each engine is told of a plan, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Level, Plan, Rule
from leanmoe.serve.export import export, uniform_top_k

QWEN = Fingerprint("Qwen3MoeForCausalLM", 48, 2, 128, 8)
SIX = Plan.uniform(QWEN, Rule(top_k=6))
SHARED = Plan.banded(
    QWEN, (Band(30, (Rule(guaranteed=3),) * 2), Band(None, (Rule(), Rule(top_k=6))))
)
PROMPT = Plan.banded(QWEN, SHARED.bands, (Rule(top_k=2), Rule()))
PATH = Path("plan.json")


def test_llama_cpp_gets_the_exact_override() -> None:
    recipe = export(SIX, PATH, "llama.cpp", "model.gguf")
    assert recipe.command[-2:] == ("--override-kv", "qwen3moe.expert_used_count=int:6")


def test_llama_cpp_takes_the_name_of_an_architecture_it_does_not_list() -> None:
    odd = Plan.uniform(Fingerprint("OddForCausalLM", 2, 2, 8, 4), Rule(top_k=2))
    with pytest.raises(LeanMoeError, match="--gguf-arch"):
        export(odd, PATH, "llama.cpp")
    assert "odd.expert_used_count=int:2" in export(odd, PATH, "llama.cpp", gguf="odd").text()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (SHARED, "guaranteed"),
        (Plan.uniform(QWEN, Rule(top_k=6, renormalise=0.0)), "renormalise"),
        (Plan.per_layer(QWEN, (Rule(top_k=6), Rule(top_k=7))), "other layers"),
        (Plan.banded(QWEN, (Band(8, (Rule(top_k=6),) * 2),)), "bands"),
        (PROMPT, "prompt"),
    ],
)
def test_llama_cpp_refuses_what_is_more_than_one_top_k(plan: Plan, reason: str) -> None:
    with pytest.raises(LeanMoeError, match=reason):
        export(plan, PATH, "llama.cpp")


def test_a_uniform_plan_needs_no_plugin_in_sglang() -> None:
    recipe = export(SIX, PATH, "sglang", "some/model")
    assert not recipe.environment
    assert json.loads(recipe.command[-1]) == {"num_experts_per_tok": 6}
    assert export(SHARED, PATH, "sglang").environment["LEANMOE_PLAN"] == str(PATH.resolve())


@pytest.mark.parametrize(
    ("config", "override"),
    [
        ({"num_experts_per_tok": 8}, {"num_experts_per_tok": 6}),
        ({"moe_k": 8}, {"moe_k": 6}),
        ({"text_config": {"num_experts_per_tok": 8}}, {"text_config": {"num_experts_per_tok": 6}}),
        ({"thinker_config": {"text_config": {"num_experts_per_tok": 8}}}, None),
    ],
)
def test_an_override_is_of_the_key_that_the_model_reads(
    tmp_path: Path, config: object, override: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = export(SIX, PATH, "sglang", str(tmp_path))
    if override is None:
        assert recipe.environment["LEANMOE_PLAN"]
        assert "--json-model-override-args" not in recipe.command
    else:
        assert not recipe.environment
        assert json.loads(recipe.command[-1]) == override
    hint = [note for note in export(SIX, PATH, "vllm", str(tmp_path)).notes if "overrides" in note]
    assert bool(hint) == (override is not None)


@pytest.mark.parametrize(
    "architecture", ["Qwen3VLMoeForConditionalGeneration", "Ernie4_5_MoeForCausalLM", "qwen3_moe"]
)
def test_the_plugin_runs_where_the_models_key_is_not_known(architecture: str) -> None:
    plan = Plan.uniform(replace(QWEN, architecture=architecture), Rule(top_k=6))
    recipe = export(plan, PATH, "sglang", "some/model")
    assert recipe.environment["LEANMOE_PLAN"] == str(PATH.resolve())
    assert "--json-model-override-args" not in recipe.command


def test_vllm_captures_the_ends_of_the_bands() -> None:
    recipe = export(SHARED, PATH, "vllm", "some/model")
    sizes = json.loads(recipe.command[-1])["cudagraph_capture_sizes"]
    assert 30 in sizes
    assert sizes == sorted(sizes)
    assert any("capture sizes" in note for note in recipe.notes)


def test_rules_for_prompts_run_in_sglang_only_if_the_user_drops_them() -> None:
    engine = "sglang"
    with pytest.raises(LeanMoeError, match="--drop prompt"):
        export(PROMPT, PATH, engine)
    recipe = export(PROMPT, PATH, engine, drop=["prompt"])
    assert recipe.environment["LEANMOE_DROP"] == "prompt"
    assert recipe.left_out == ("prompt",)
    assert "Left out of the plan: prompt" in recipe.text()


def test_transformers_runs_all_of_a_plan() -> None:
    assert 'Plan.load("plan.json")' in export(PROMPT, PATH, "transformers", "m").text()
    with pytest.raises(LeanMoeError, match="runs all"):
        export(PROMPT, PATH, "transformers", drop=["prompt"])


def test_a_level_is_named_where_one_is_chosen() -> None:
    two = Plan(QWEN, (Level("0.2%", SIX.bands), Level("1%", SHARED.bands)))
    assert export(two, PATH, "vllm", level="1%").environment["LEANMOE_LEVEL"] == "1%"
    code = export(two, PATH, "transformers", "m", level="0.2%").text()
    assert 'Plan.load("plan.json").at("0.2%")' in code
    assert export(two, PATH, "llama.cpp", level="0.2%").command[-1].endswith("int:6")
    with pytest.raises(LeanMoeError, match=r"the levels 0\.2%, 1%: choose one"):
        export(two, PATH, "vllm")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="did you mean vllm"):
        export(SIX, PATH, "vlm")


def test_only_one_top_k_everywhere_is_uniform() -> None:
    assert uniform_top_k(SIX) == 6
    assert uniform_top_k(SHARED) is None
    assert uniform_top_k(Plan.banded(QWEN, (Band(8, (Rule(top_k=6),) * 2),))) is None
    assert uniform_top_k(Plan(QWEN)) is None


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
def test_a_budget_per_rank_runs_in_vllm_alone(engine: str) -> None:
    plan = Plan.per_layer(QWEN, (Rule(), Rule(budget_per_rank=6)))
    with pytest.raises(LeanMoeError, match="budget_per_rank"):
        export(plan, PATH, engine)
    export(plan, PATH, "transformers")
    export(plan, PATH, "vllm")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_lies_beyond_the_last_band_is_said(engine: str) -> None:
    def notes_of(end: int | None) -> str:
        plan = Plan.banded(QWEN, (Band(end, (Rule(guaranteed=3),) * QWEN.moe_layers),))
        return export(plan, PATH, engine).text()

    assert "steps of more than 64 rows run the full model" in notes_of(64)
    assert "run the full model" not in notes_of(None)
