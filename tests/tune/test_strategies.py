"""Every strategy spends what it is given and no more."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.tune.strategies import STRATEGIES, Setting
from tests.tune.example import MODEL, cost, setting

PUBLISHED = ("uniform", "bhep", "threshold", "top_p", "lexi")


@pytest.mark.parametrize("budget", [7.5, 6.0, 4.2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_spends_the_budget_and_no_more(name: str, budget: float) -> None:
    given = setting(budget, decode_batch=8)
    rules = STRATEGIES[name].rules(given)
    assert len(rules) == MODEL.moe_layers
    for rule in rules:
        rule.check(MODEL)
    spent = given.mean_cost(rules)
    assert spent <= budget
    assert spent > budget - (1.0 if name in (*PUBLISHED, "uniform_kept") else 3.0)


def test_more_experts_go_where_a_strategy_says() -> None:
    counts = [rule.top_k or 0 for rule in STRATEGIES["bhep"].rules(setting(6.0))]
    assert counts == sorted(counts), "(6, 8, 8, 61): fewest in the first layer"
    lexi = [rule.top_k or 0 for rule in STRATEGIES["lexi"].rules(setting(6.0))]
    assert lexi == sorted(lexi, reverse=True), "the first layers move most on random input"
    own = [cost(n, rule) for n, rule in enumerate(STRATEGIES["leanmoe"].rules(setting(6.0)))]
    assert own[0] < own[-1], "the last layers lose most"


def test_own_takes_what_measures_best_on_calibration_text() -> None:
    given = setting(6.0)  # alone: uniform, threshold and top_p with kept weights take part
    kept = STRATEGIES["uniform_kept"].rules(given)
    measured = Setting(**{**vars(given), "measure": lambda rules: float(rules != kept)})
    assert STRATEGIES["leanmoe"].rules(measured) == kept
    assert STRATEGIES["leanmoe"].rules(given) != kept


def test_an_unknown_strategy_is_named_with_the_nearest() -> None:
    with pytest.raises(LeanMoeError, match="did you mean threshold"):
        STRATEGIES["treshold"]
