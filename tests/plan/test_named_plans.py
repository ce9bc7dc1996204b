"""Plans that are compared: from files and from rules in words, each under a name of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Level, Plan, Rule
from leanmoe.plan.named_plans import Named, parse_rule, read_plans, require_at_work

MODEL = Fingerprint("Model", 3, 2, 8, 4)


def saved(path: Path, plan: Plan | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    (plan or Plan.uniform(MODEL, Rule(top_k=2))).save(path)
    return path


def test_rules_in_words() -> None:
    assert parse_rule("top_k=6, renormalise=0") == Rule(top_k=6, renormalise=0.0)
    assert parse_rule("threshold=0.2") == Rule(threshold=0.2)
    with pytest.raises(LeanMoeError, match="did you mean top_k"):
        parse_rule("topk=6")
    for words in ("top_k=" + "[" * 5000, "top_k=" + "9" * 5000):
        with pytest.raises(LeanMoeError, match=r"sets top_k to .*give a number"):
            parse_rule(words)
    with pytest.raises(LeanMoeError, match="sets top_k to 'six': give a number"):
        parse_rule("top_k=six")


def test_a_plan_is_called_by_its_file_or_by_the_folder_of_its_run(tmp_path: Path) -> None:
    files = [saved(tmp_path / "careful.json"), saved(tmp_path / "run" / "plan.json")]
    plans = read_plans(files, ["top_k=3"], MODEL)
    assert [each.name for each in plans] == ["careful", "run", "top_k=3"]
    assert plans[0].digest == plans[1].digest != plans[2].digest


def test_two_plans_of_one_name_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "careful.json")
    with pytest.raises(LeanMoeError, match="careful"):
        read_plans([file, file], (), MODEL)


def test_of_a_plan_with_several_levels_one_or_more_are_chosen(tmp_path: Path) -> None:
    levels = [
        Level(name, Plan.uniform(MODEL, Rule(top_k=k)).bands) for name, k in (("a", 3), ("b", 2))
    ]
    two = saved(tmp_path / "two.json", Plan(MODEL, tuple(levels)))
    one = saved(tmp_path / "one.json")
    with pytest.raises(LeanMoeError, match=r"plan two: the plan has the levels a, b: choose one"):
        read_plans([two], (), MODEL)
    (chosen,) = read_plans([two], (), MODEL, levels=["b"])
    assert (chosen.name, chosen.plan.level, chosen.file) == ("two", levels[1], two)
    both = read_plans([two, one], (), MODEL, levels=["a", "b"])
    assert [each.name for each in both] == ["two a", "two b", "one"]
    for files in ([two], [one]):
        with pytest.raises(LeanMoeError, match="'c' is not known"):
            read_plans(files, (), MODEL, levels=["c"])


def test_a_plan_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "careful.json")
    with pytest.raises(LeanMoeError, match="its experts is 8, this model's is 16"):
        read_plans([file], (), replace(MODEL, experts=16))


def test_a_plan_must_change_the_steps_it_is_measured_in() -> None:
    rules = (Rule(guaranteed=1),) * 2
    named = Named("small steps", Plan.banded(MODEL, (Band(4, rules),)))
    require_at_work([named], 4)
    assert named.is_batch_aware(4)
    with pytest.raises(LeanMoeError, match="runs the full model in steps of 8 tokens"):
        require_at_work([named], 8)
