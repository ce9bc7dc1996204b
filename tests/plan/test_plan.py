"""Plans: what is written is read back, and whatever a model cannot run is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import Margin
from leanmoe.plan import Band, Fingerprint, Level, Plan, Rule
from tests.core.test_proof import proof

MODEL = Fingerprint("DeepseekV3ForCausalLM", layers=3, moe_layers=2, experts=16, top_k=4)
MADE = {"date": "2026-01-01", "documents": 12}
LAST = Level(
    "0.5%",
    (
        Band(4, (Rule(top_k=3), Rule(threshold=0.25, top_p=0.9))),
        Band(None, (Rule(), Rule(guaranteed=2, budget=9, experts=(0, 3, 5, *range(7, 16))))),
    ),
    prompt=(Rule(top_k=0), Rule(top_k=1)),
)
PLAN = Plan(MODEL, (LAST,), MADE)
CAREFUL = Level("0.2%", (Band(8, (Rule(top_k=3), Rule())),), proof=proof(Margin(0.002)))
TWO = Plan(MODEL, (CAREFUL, LAST), MADE)
SHARES = st.floats(0, 1, exclude_min=True)


def rules(fewest: int = 1) -> st.SearchStrategy[Rule]:
    """Any rule that the model can run."""
    return st.builds(
        Rule,
        top_k=st.none() | st.integers(fewest, MODEL.top_k),
        threshold=st.none() | SHARES,
        top_p=st.none() | SHARES,
        guaranteed=st.none() | st.just(1),
        budget=st.none() | st.integers(1, MODEL.top_k),
        budget_per_rank=st.none() | st.integers(1, MODEL.top_k),
        experts=st.none()
        | st.sets(st.integers(0, MODEL.experts - 1), min_size=MODEL.top_k).map(tuple),
    )


def layers_of_rules(fewest: int = 1) -> st.SearchStrategy[tuple[Rule, ...]]:
    return st.lists(rules(fewest), min_size=MODEL.moe_layers, max_size=MODEL.moe_layers).map(tuple)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan for the model: bands in order, the last one perhaps without an end."""
    ends: list[int | None] = sorted(draw(st.sets(st.integers(1, 4096), max_size=4)))  # type: ignore[assignment]
    if draw(st.booleans()):
        ends.append(None)
    bands = tuple(Band(end, draw(layers_of_rules())) for end in ends)
    prompt = draw(st.just(()) | layers_of_rules(fewest=0))
    plan = Plan.banded(MODEL, bands, prompt)
    return replace(plan, provenance=draw(st.dictionaries(st.text(), st.integers())))


@given(plans())
def test_json_gives_the_plan_back(plan: Plan) -> None:
    plan.check(MODEL)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_files_give_the_plan_back(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_may_be_named_by_a_word(tmp_path: Path) -> None:
    PLAN.save(str(tmp_path / "plan.json"))
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN


def test_json_holds_only_what_is_set() -> None:
    assert PLAN.to_json() == {
        "leanmoe_plan": 2,
        "model": {
            "architecture": "DeepseekV3ForCausalLM",
            "layers": 3,
            "moe_layers": 2,
            "experts": 16,
            "top_k": 4,
        },
        "levels": [
            {
                "name": "0.5%",
                "bands": [
                    {"up_to": 4, "rules": [{"top_k": 3}, {"threshold": 0.25, "top_p": 0.9}]},
                    {
                        "up_to": None,
                        "rules": [
                            {},
                            {"guaranteed": 2, "budget": 9, "experts": [0, 3, 5, *range(7, 16)]},
                        ],
                    },
                ],
                "prompt": [{"top_k": 0}, {"top_k": 1}],
            }
        ],
        "provenance": {"date": "2026-01-01", "documents": 12},
    }


def first_schema() -> dict[str, Any]:
    """The plan as a file of schema 1 holds it."""
    content = PLAN.to_json()
    (level,) = content.pop("levels")
    return {**content, "leanmoe_plan": 1, "bands": level["bands"], "prompt": level["prompt"]}


def test_a_file_of_schema_1_is_a_plan_with_one_level() -> None:
    read = Plan.from_json(first_schema())
    assert read == replace(PLAN, levels=(replace(LAST, name="lean"),))
    assert read.to_json()["leanmoe_plan"] == 2
    less = {key: value for key, value in first_schema().items() if key != "prompt"}
    assert Plan.from_json(less).prompt == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bands", None, r"plan\.bands is None: it must be a list"),
        ("prompt", [{"top_k": -1}, {}], r"prompt\[0\]\.top_k is -1: it must be 0 to 16"),
        ("levels", [], "plan has levels: a file of schema 1"),
        ("extra", 1, "plan has an unknown field 'extra'"),
    ],
)
def test_malformed_files_of_schema_1_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        Plan.from_json({**first_schema(), field: value})


def test_several_levels_and_their_proofs_are_read_back() -> None:
    assert Plan.from_json(json.loads(json.dumps(TWO.to_json()))) == TWO


def test_one_of_several_levels_must_be_chosen() -> None:
    several = "the plan has the levels 0.2%, 0.5%: choose one"
    for ask in (lambda: TWO.bands, lambda: TWO.prompt, lambda: TWO.rules_for(3)):
        with pytest.raises(LeanMoeError, match=several):
            ask()
    with pytest.raises(LeanMoeError, match=several):
        TWO.at(None)
    assert TWO.at("0.5%") == PLAN
    assert TWO.at("0.2%").level == CAREFUL
    assert PLAN.at(None) is PLAN
    with pytest.raises(LeanMoeError, match=r"level '0\.3%' is not known: .*known are 0\.2%, 0\.5%"):
        TWO.at("0.3%")


def test_a_changed_level_is_proven_no_more() -> None:
    changed = TWO.at("0.2%").with_level(prompt=(Rule(top_k=1), Rule()))
    assert changed.level == replace(CAREFUL, prompt=(Rule(top_k=1), Rule()), proof=None)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "-x", "%2", "a" * 33, "é", "a\n"])
def test_names_that_no_url_could_hold(name: str) -> None:
    with pytest.raises(LeanMoeError, match="a name is 1 to 32 letters, digits"):
        Level(name)


@pytest.mark.parametrize("name", ["full", "Strict", "stock", "trained"])
def test_names_of_the_model_as_it_was_trained(name: str) -> None:
    with pytest.raises(LeanMoeError, match="mean the model as it was trained"):
        Level(name)


def test_levels_are_in_order_and_have_names_of_their_own() -> None:
    with pytest.raises(LeanMoeError, match=r"two levels are called 0\.2%"):
        Plan(MODEL, (CAREFUL, CAREFUL)).check(MODEL)
    least = replace(CAREFUL, name="least", proof=proof(Margin(0.001)))
    with pytest.raises(LeanMoeError, match=r"level least was proven within 0\.1%, level 0\.2% bef"):
        Plan(MODEL, (CAREFUL, LAST, least)).check(MODEL)
    Plan(MODEL, (least, CAREFUL, LAST)).check(MODEL)
    with pytest.raises(LeanMoeError, match=r"level least: prompt has 1 rules"):
        Plan(MODEL, (replace(least, prompt=(Rule(),)), CAREFUL)).check(MODEL)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(top_k=0), r"top_k is 0: it must be 1 to 4 \(the model was trained with 4\)"),
        (Rule(top_k=5), r"top_k is 5: it must be 1 to 4 \(the model was trained with 4\)"),
        (Rule(top_k=-1), "top_k is -1"),
        (Rule(top_k=2.5), r"top_k is 2\.5: it must be a whole number"),  # type: ignore[arg-type]
        (Rule(top_k=True), "top_k is True: it must be a whole number"),
        (Rule(top_k=3, experts=(1, 2)), r"top_k is 3: it must be 1 to 2 \(2 experts remain\)"),
        (Rule(threshold=0.0), r"threshold is 0\.0: it must be above 0 and at most 1"),
        (Rule(threshold=1.01), r"threshold is 1\.01"),
        (Rule(threshold=float("nan")), "threshold is nan"),
        (Rule(threshold="0.5"), "threshold is '0.5': it must be a number"),  # type: ignore[arg-type]
        (Rule(top_p=0), "top_p is 0: it must be above 0"),
        (Rule(top_p=float("inf")), "top_p is inf"),
        (Rule(guaranteed=0), "guaranteed is 0: it must be 1 to 4"),
        (Rule(guaranteed=5), "guaranteed is 5: it must be 1 to 4"),
        (Rule(guaranteed=3, top_k=2), "guaranteed is 3: it must be 1 to 2"),
        (Rule(budget=0), "budget is 0: it must be 1 to 16"),
        (Rule(budget=17), "budget is 17: it must be 1 to 16"),
        (Rule(budget=3, experts=(1, 2)), "budget is 3: it must be 1 to 2"),
        (Rule(budget_per_rank=0), "budget_per_rank is 0: it must be 1 to 16"),
        (Rule(budget_per_rank=3, experts=(1, 2)), "budget_per_rank is 3: it must be 1 to 2"),
        (Rule(budget_per_rank=True), "budget_per_rank is True: it must be a whole number"),
        (Rule(renormalise=1.5), r"renormalise is 1\.5: it must be 0 to 1"),
        (Rule(renormalise=-0.25), r"renormalise is -0\.25: it must be 0 to 1"),
        (Rule(renormalise=float("nan")), "renormalise is nan: it must be 0 to 1"),
        (Rule(renormalise=True), "renormalise is True: it must be a number"),
        (Rule(experts=()), "experts is empty: at least one expert must remain"),
        (Rule(experts=(), top_k=2), "experts is empty"),
        (Rule(experts=(3, 3)), "experts names an expert twice"),
        (Rule(experts=(3, 16)), "experts names 16: it must be 0 to 15"),
        (Rule(experts=(-1,)), "experts names -1: it must be 0 to 15"),
    ],
)
def test_rules_out_of_range_are_named(rule: Rule, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        rule.check(MODEL)


def test_kept_weights_of_older_files_are_read() -> None:
    assert Rule.from_json({"top_k": 3, "keep_weights": True}) == Rule(top_k=3, renormalise=0.0)
    assert Rule.from_json({"top_k": 3, "keep_weights": False}) == Rule(top_k=3)
    assert Rule(top_k=3, renormalise=0.0).to_json() == {"top_k": 3, "renormalise": 0.0}
    with pytest.raises(LeanMoeError, match="unknown field 'keep_weights'"):
        Rule.from_json({"keep_weights": 1})


def test_where_a_rule_stands_is_named() -> None:
    plan = Plan.banded(MODEL, (Band(2, (Rule(), Rule())), Band(None, (Rule(), Rule(top_k=9)))))
    with pytest.raises(LeanMoeError, match=r"bands\[1\]\.rules\[1\]\.top_k is 9"):
        plan.check(MODEL)
    with pytest.raises(LeanMoeError, match=r"prompt\[0\]\.budget is 99"):
        Plan.banded(MODEL, prompt=(Rule(budget=99), Rule())).check(MODEL)


def test_more_experts_than_trained_only_where_asked_for() -> None:
    plan = Plan.uniform(MODEL, Rule(top_k=16, guaranteed=5))
    with pytest.raises(LeanMoeError, match="top_k is 16"):
        plan.check(MODEL)
    plan.check(MODEL, more_experts=True)
    with pytest.raises(LeanMoeError, match=r"top_k is 17: it must be 1 to 16 \(16 experts remain"):
        Plan.uniform(MODEL, Rule(top_k=17)).check(MODEL, more_experts=True)


def test_no_expert_at_all_is_for_prompt_tokens_only() -> None:
    Plan.banded(MODEL, prompt=(Rule(top_k=0),) * 2).check(MODEL)
    with pytest.raises(LeanMoeError, match="top_k is 0"):
        Plan.uniform(MODEL, Rule(top_k=0)).check(MODEL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen3MoeForCausalLM"),
        ("layers", 4),
        ("moe_layers", 3),
        ("experts", 17),
        ("top_k", 5),
    ],
)
def test_another_models_plan_is_refused_by_name(field: str, value: Any) -> None:
    other = replace(MODEL, **{field: value})
    with pytest.raises(LeanMoeError, match=f"made for another model: its {field} is .* {value}$"):
        PLAN.check(other)


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(None, 2), (8, 2)], r"bands\[0\]\.up_to is null: only the last band"),
        ([(8, 2), (8, 2)], r"bands\[1\]\.up_to is 8: it must be above 8"),
        ([(8, 2), (4, 2)], r"bands\[1\]\.up_to is 4: it must be above 8"),
        ([(0, 2)], r"bands\[0\]\.up_to is 0: it must be above 0"),
        ([(-3, 2)], r"bands\[0\]\.up_to is -3"),
        ([(8, 1)], r"bands\[0\] has 1 rules: the model has 2 MoE layers"),
        ([(8, 0)], r"bands\[0\] has 0 rules"),
    ],
)
def test_bands_out_of_order_or_short(bands: list[tuple[int | None, int]], message: str) -> None:
    plan = Plan.banded(MODEL, tuple(Band(end, (Rule(),) * count) for end, count in bands))
    with pytest.raises(LeanMoeError, match=message):
        plan.check(MODEL)


def test_too_few_prompt_rules() -> None:
    with pytest.raises(LeanMoeError, match="prompt has 1 rules: the model has 2 MoE layers"):
        Plan.banded(MODEL, prompt=(Rule(),)).check(MODEL)


def test_a_step_falls_into_the_first_band_that_holds_it() -> None:
    small, large = (Rule(top_k=1),) * 2, (Rule(top_k=2),) * 2
    plan = Plan.banded(MODEL, (Band(4, small), Band(32, large)))
    assert [plan.rules_for(tokens) for tokens in (1, 4)] == [small, small]
    assert [plan.rules_for(tokens) for tokens in (5, 32)] == [large, large]
    assert plan.band_for(33) is None
    assert plan.rules_for(33) == (Rule(), Rule())
    assert Plan.per_layer(MODEL, small).rules_for(10**9) == small


@given(plans(), st.integers(1, 5000))
def test_every_step_has_one_rule_a_layer(plan: Plan, tokens: int) -> None:
    assert len(plan.rules_for(tokens)) == MODEL.moe_layers
    band = plan.band_for(tokens)
    if band is not None and band.up_to is not None:
        assert tokens <= band.up_to


def test_what_counts_as_empty() -> None:
    assert Rule().is_empty
    assert not Rule(experts=(0,)).is_empty
    assert Plan(MODEL).is_empty
    assert Plan.uniform(MODEL, Rule()).is_empty
    assert not Plan.banded(MODEL, prompt=(Rule(), Rule(top_k=1))).is_empty
    assert not PLAN.is_empty


@pytest.mark.parametrize(
    ("rule", "depends"),
    [
        (Rule(top_k=2, threshold=0.5, top_p=0.5), False),
        (Rule(guaranteed=1), True),
        (Rule(budget=1), True),
        (Rule(budget_per_rank=1), True),
    ],
)
def test_which_rules_depend_on_other_tokens(rule: Rule, depends: bool) -> None:
    assert rule.is_batch_aware is depends


@pytest.mark.parametrize(
    ("rule", "on_one"),
    [
        (Rule(budget_per_rank=3), Rule(budget=3)),
        (Rule(budget=5, budget_per_rank=3, top_k=2), Rule(budget=3, top_k=2)),
        (Rule(budget=2, budget_per_rank=3), Rule(budget=2)),
        (Rule(budget=2, guaranteed=1), Rule(budget=2, guaranteed=1)),
        (Rule(), Rule()),
    ],
)
def test_on_one_rank_a_budget_per_rank_is_a_budget(rule: Rule, on_one: Rule) -> None:
    assert rule.on(1) == on_one
    assert rule.on(2) is rule
    assert Plan.uniform(MODEL, rule).has_budget_per_rank == (rule.budget_per_rank is not None)


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The plan's JSON with one value changed; `...` removes it."""
    plan: dict[str, Any] = json.loads(json.dumps(PLAN.to_json()))
    place: Any = plan
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return plan


LEVEL = ("levels", 0)
FIRST_RULE = (*LEVEL, "bands", 0, "rules", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("leanmoe_plan",), 3, "schema version 3: this leanmoe reads 2"),
        (("leanmoe_plan",), ..., "schema version None"),
        (("extra",), 1, "plan has an unknown field 'extra': allowed are model, levels, "),
        (("model",), ..., "plan.model is missing"),
        (("model", "experts"), ..., r"plan\.model\.experts is missing"),
        (("model", "experts"), "16", r"plan\.model\.experts is '16': it must be a whole number"),
        (("model", "architecture"), 3, r"plan\.model\.architecture is 3: it must be text"),
        (("model", "heads"), 3, r"plan\.model has an unknown field 'heads'"),
        ((*LEVEL, "bands"), None, r"levels\[0\]\.bands is None: it must be a list"),
        ((*LEVEL, "bands"), {}, r"bands is {}: it must be a list"),
        ((*LEVEL, "bands", 0), [], r"bands\[0\] is \[\]: it must be an object"),
        (
            (*LEVEL, "bands", 0, "up_to"),
            "4",
            r"bands\[0\]\.up_to is '4': it must be a whole number",
        ),
        ((*LEVEL, "bands", 0, "up_to"), 4.5, r"bands\[0\]\.up_to is 4\.5"),
        ((*LEVEL, "bands", 0, "rules"), ..., r"bands\[0\]\.rules is missing"),
        ((*LEVEL, "bands", 1, "rules", 0), 5, r"bands\[1\]\.rules\[0\] is 5: it must be an object"),
        ((*FIRST_RULE, "topk"), 3, r"bands\[0\]\.rules\[0\] has an unknown field 'topk'"),
        ((*FIRST_RULE, "top_k"), 3.0, r"rules\[0\]\.top_k is 3\.0: it must be a whole number"),
        ((*FIRST_RULE, "top_k"), True, r"rules\[0\]\.top_k is True"),
        ((*FIRST_RULE, "top_k"), 17, r"rules\[0\]\.top_k is 17: it must be 1 to 16"),
        ((*FIRST_RULE, "budget_per_rank"), 2.0, r"budget_per_rank is 2\.0: it must be a whole"),
        ((*FIRST_RULE, "threshold"), "a", r"threshold is 'a': it must be a number"),
        ((*FIRST_RULE, "experts"), "all", r"experts is 'all': it must be a list"),
        ((*FIRST_RULE, "experts"), [0, 1.5], r"experts\[1\] is 1\.5: it must be a whole number"),
        ((*LEVEL, "prompt"), {}, r"levels\[0\]\.prompt is {}: it must be a list"),
        ((*LEVEL, "prompt", 0, "top_k"), -1, r"prompt\[0\]\.top_k is -1: it must be 0 to 16"),
        ((*LEVEL, "name"), ..., r"plan\.levels\[0\]\.name is missing"),
        ((*LEVEL, "name"), "a b", r"plan\.levels\[0\]: a level is called 'a b'"),
        ((*LEVEL, "proof"), 1, r"levels\[0\]\.proof is 1: it must be an object"),
        ((*LEVEL, "margin"), 1, r"levels\[0\] has an unknown field 'margin'"),
        (("provenance",), [], r"plan\.provenance is \[\]: it must be an object"),
    ],
)
def test_malformed_plans_are_named(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        Plan.from_json(changed(path, value))


@pytest.mark.parametrize("value", [None, [], "plan", 3])
def test_what_is_no_plan_at_all(value: Any) -> None:
    with pytest.raises(LeanMoeError, match=r"plan is .* it must be an object"):
        Plan.from_json(value)


def test_prompt_rules_may_be_left_out() -> None:
    without = replace(PLAN, levels=(replace(LAST, prompt=()),))
    assert Plan.from_json(changed((*LEVEL, "prompt"), ...)) == without


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"plan .*plan\.json is not JSON"),
        (b"\xff\xff", "cannot read plan"),
        (b"", "not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(LeanMoeError, match=message):
        Plan.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"cannot read plan .*none\.json: No such file"):
        Plan.load(tmp_path / "none.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "leanmoe_plan",
                        "model",
                        "levels",
                        "proof",
                        "bands",
                        "up_to",
                        "rules",
                        "top_k",
                        "prompt",
                        "experts",
                    ]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_anything_else_is_refused_without_a_traceback(value: Any) -> None:
    with pytest.raises(LeanMoeError):
        Plan.from_json(value)


@given(
    st.sampled_from(
        [LEVEL, (*LEVEL, "prompt"), ("levels",), ("model",), FIRST_RULE, (*FIRST_RULE, "top_k")]
    ),
    st.recursive(
        st.none() | st.integers(-2, 20) | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["up_to", "rules", "top_k", "experts"]), inner)
        ),
        max_leaves=6,
    ),
)
def test_one_wrong_place_gives_a_plan_or_an_error(path: tuple[Any, ...], value: Any) -> None:
    try:
        plan = Plan.from_json(changed(path, value))
    except LeanMoeError:
        return
    plan.check(MODEL, more_experts=True)
