"""How a rule row follows from a token's role."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.routing import RowRule, RuleTable


def numbers(row: RowRule) -> tuple[int, int, int, int]:
    return row.slots, row.own, row.marks, row.must


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (Rule(), (8, 8, 8, 8)),
        (Rule(top_k=3, threshold=0.5), (3, 3, 3, 3)),
        (Rule(guaranteed=2), (8, 2, 2, 2)),
        (Rule(top_k=4, guaranteed=2, budget=5), (4, 1, 2, 1)),
        (Rule(top_k=4, budget_per_rank=5), (4, 1, 4, 1)),
        (Rule(top_k=0, guaranteed=2), (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_a_reply_row_follows_from_its_rule(rule: Rule, wanted: tuple[int, ...]) -> None:
    assert numbers(RowRule.reply(rule, 8)) == wanted


def test_row_0_is_the_model_as_trained_and_levels_have_two_rows_each() -> None:
    strict, economy = Rule(top_k=6), Rule(guaranteed=2)
    table = RuleTable.of(8, [(strict, None), (economy, Rule(top_k=0))])
    assert [row.rule for row in table.rows] == [Rule(), strict, strict, economy, Rule(top_k=0)]
    assert table.rows[0] == RowRule.trained(8)
    assert table.rows[2] == table.rows[1], "without prompt rules prompt tokens are as any other"
    assert numbers(table.rows[4]) == (0, 0, 0, 0)
    assert table.slots == 8
    assert hash(table) == hash(RuleTable(table.rows))


def test_prompt_rows_keep_their_slots_and_give_nothing() -> None:
    assert numbers(RowRule.prompt(Rule(top_k=4, top_p=0.5), 8)) == (4, 4, 0, 0)


@pytest.mark.parametrize("field", ["guaranteed", "budget", "budget_per_rank"])
def test_a_batch_aware_prompt_rule_is_refused_by_name(field: str) -> None:
    rule = Rule(**{field: 3})  # type: ignore[arg-type]
    with pytest.raises(LeanMoeError, match=rf"levels\[2\]\.prompt\.{field} is 3"):
        RuleTable.of(8, [(Rule(), None), (Rule(), rule)])


def test_the_budget_of_a_step_is_the_largest_that_a_row_asks_for() -> None:
    def budgets(*rules: Rule) -> tuple[int | None, int | None]:
        rule = RuleTable.of(8, [(rule, None) for rule in rules]).step_rule
        return rule.budget, rule.budget_per_rank

    assert budgets(Rule(budget=9), Rule(guaranteed=2), Rule(budget=12)) == (12, None)
    assert budgets(Rule(budget=9, budget_per_rank=3), Rule(budget=7)) == (9, None)
    assert budgets(Rule(budget=9), Rule(budget_per_rank=3)) == (None, None)
    assert budgets(Rule(guaranteed=2), Rule(top_k=4)) == (None, None)


def test_on_one_rank_the_budget_per_rank_is_a_budget() -> None:
    table = RuleTable.of(8, [(Rule(budget_per_rank=3), None)])
    assert table.on(1).step_rule == Rule(budget=3)
    assert table.on(2) == table


@pytest.mark.parametrize("wrong", [(5, 0, 0), (1, 5, 1), (1, 1, 2), (-1, 1, 1)])
def test_numbers_that_no_slots_could_have_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(LeanMoeError, match="of 4 slots: must is at most marks"):
        RowRule(Rule(guaranteed=1), 4, *wrong)
