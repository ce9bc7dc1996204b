"""Tiers: what a request may ask for, what it gets, and whose cached blocks it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Level, Plan, Rule
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.tiers import KEY, BadRequestError, StepChoice, Tier, Tiers, tiers_of

MODEL = Fingerprint("Model", 1, 1, 8, 4)


def level(name: str, top_k: int, *prompt: Rule) -> Level:
    return Level(name, (Band(None, (Rule(top_k=top_k),)),), prompt)


PLAN = Plan(MODEL, (level("careful", 3), level("usual", 2, Rule(top_k=1)), level("fast", 1)))
OTHER = replace(PLAN, levels=(level("careful", 2), level("usual", 2), level("fast", 1)))
TIERS = Tiers((PLAN, OTHER), "usual")


def test_a_request_names_a_level_full_or_strict() -> None:
    assert TIERS.asked({KEY: "fast"}) == Tier("fast", 3)
    assert TIERS.asked({KEY: "full"}) == Tier("full", 0)
    assert TIERS.asked({KEY: "strict"}) == Tier("strict", 0, may_degrade=False)
    assert TIERS.asked(None) == TIERS.asked({"other": 1}) == Tier("usual", 2)


@pytest.mark.parametrize("name", ["economy", "Fast", "", 1, True, ["fast"]])
def test_an_unknown_tier_is_a_bad_request(name: Any) -> None:
    with pytest.raises(BadRequestError, match="must be one of strict, full, careful, usual, fast"):
        TIERS.asked({KEY: name})
    assert issubclass(BadRequestError, ValueError), "vLLM answers a ValueError with HTTP 400"


def test_the_own_tier_is_the_most_careful_level_unless_it_is_chosen() -> None:
    assert Tiers((PLAN,)).default == Tier("careful", 1)
    assert Tiers((PLAN,), "full").default == Tier("full", 0)
    assert Tiers((Plan(MODEL),)).default == Tier("full", 0)
    with pytest.raises(LeanMoeError, match="--level is 'strict': it must be one of full, careful"):
        Tiers((PLAN,), "strict")


def test_a_server_without_tiers_serves_its_own_alone() -> None:
    closed = Tiers((Plan(MODEL, PLAN.levels[:1]),), are_open=False)
    assert closed.asked({KEY: "careful"}) == closed.asked(None) == Tier("careful", 1)
    for name in ("strict", "full", "economy"):
        with pytest.raises(BadRequestError, match="no tiers; --tiers starts it with them"):
            closed.asked({KEY: name})


def test_load_may_ask_for_levels_beyond_the_own_one_alone() -> None:
    assert Tiers((PLAN,), "full").faster == (0, 1, 2, 3)
    assert Tiers((PLAN,)).faster == (0, 2, 3)
    assert TIERS.faster == (0, 3)
    assert Tiers((PLAN,), "fast").faster == (0,)


@given(st.sampled_from(["strict", "full", *TIERS.levels]), st.integers(0, 3))
def test_load_makes_no_reply_more_careful_and_touches_no_prompt_and_no_strict_tier(
    name: str, load: int
) -> None:
    tier = TIERS.asked({KEY: name})
    prompt, reply = TIERS.numbers(tier, StepChoice(0, load))
    assert prompt == tier.level
    assert reply >= tier.level
    assert reply == (0 if name == "strict" else max(tier.level, load))


def test_levels_of_all_plans_are_numbered_in_one_row() -> None:
    family = TIERS.family
    assert len(family.levels) == 6
    family.check(MODEL)
    for number, plan in enumerate(TIERS.plans):
        for name in TIERS.levels:
            tier = TIERS.asked({KEY: name})
            place, _ = TIERS.numbers(tier, StepChoice(number))
            wanted = plan.levels[tier.level - 1]
            found = family.levels[place - 1]
            assert (found.bands, found.prompt) == (wanted.bands, wanted.prompt)
    assert TIERS.numbers(TIERS.asked({KEY: "full"}), StepChoice(1, 0)) == (0, 0)
    assert TIERS.numbers(TIERS.asked({KEY: "full"}), StepChoice(1, 2)) == (0, 5)


def test_plans_with_other_levels_or_of_other_models_are_no_family() -> None:
    with pytest.raises(LeanMoeError, match="another careful"):
        Tiers((PLAN, Plan(MODEL, PLAN.levels[:1])))
    with pytest.raises(LeanMoeError, match="made for another model"):
        Tiers((PLAN, replace(PLAN, model=replace(MODEL, architecture="Other"))))


def salts(tiers: Tiers, **where: int) -> list[str | None]:
    return [tiers.salt(tiers.asked({KEY: name}), None, **where) for name in tiers._tiers]


def test_tiers_of_other_rules_read_no_blocks_of_each_other() -> None:
    found = salts(TIERS)
    assert len(set(found)) == len(found)
    assert [name for name, salt in zip(TIERS._tiers, found, strict=True) if salt is None] == [
        "usual"
    ]


def test_a_salt_follows_the_rules_and_not_the_name() -> None:
    renamed = tuple(replace(each, name=f"x{each.name}") for each in PLAN.levels)
    other = Tiers((replace(PLAN, levels=renamed),), "xusual")
    assert salts(other) == salts(TIERS)
    changed = replace(PLAN, levels=(*PLAN.levels[:2], level("fast", 1, Rule(top_k=2))))
    mine, theirs = salts(TIERS), salts(Tiers((changed,), "usual"))
    assert [a == b for a, b in zip(mine, theirs, strict=True)] == [True, True, True, True, False]


def test_a_changed_plan_reads_nothing_that_was_made_before() -> None:
    before, after, back = salts(TIERS), salts(TIERS, plan=1, epoch=1), salts(TIERS, epoch=2)
    assert not set(before) & set(after)
    assert not set(back) & (set(before) | set(after))
    assert None not in after


def test_a_clients_own_salt_stays_apart_and_cannot_be_leanmoes() -> None:
    strict = TIERS.asked({KEY: "strict"})
    assert TIERS.salt(TIERS.default, "mine") == "mine"
    mine = TIERS.salt(strict, "mine")
    assert mine is not None
    assert mine.startswith("mine")
    assert mine != TIERS.salt(strict, "yours")
    with pytest.raises(BadRequestError, match="cache_salt holds 'leanmoe-'"):
        TIERS.salt(TIERS.default, TIERS.salt(strict, None))


def test_plans_and_own_tier_follow_from_the_options(tmp_path: Path) -> None:
    for name in ("a", "b"):
        PLAN.save(tmp_path / f"{name}.json")
    both = f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}"
    assert tiers_of(PluginOptions(both)) == Tiers((PLAN, PLAN))
    one = str(tmp_path / "a.json")
    assert tiers_of(PluginOptions(one, level="fast", tiers=True)) == Tiers((PLAN,), "fast")
    closed = tiers_of(PluginOptions(one, level="fast"))
    assert (closed.levels, closed.are_open, closed.own) == (("fast",), False, None)
    with pytest.raises(LeanMoeError, match="choose one"):
        tiers_of(PluginOptions(one))
