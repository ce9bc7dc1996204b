"""Every strategy spends what it is given and no more; the front is safest first."""

from __future__ import annotations

import itertools

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Rule
from leanmoe.tune.allocate import (
    Workload,
    front,
)
from leanmoe.tune.layer_time import LayerTime
from leanmoe.tune.sensitivity import (
    LEAST_RATE,
    Candidate,
    Sensitivity,
    candidates,
    loss_rates,
)
from leanmoe.tune.strategies import STRATEGIES, Budget, Setting, strategy

MODEL = Fingerprint("Model", 7, 6, 64, 8)
PUBLISHED = ("uniform", "bhep", "threshold", "top_p", "lexi")


def cost(layer: int, rule: Rule) -> float:
    """Experts a token, as if a share kept that part of them; later layers cost a little more."""
    slots = float(MODEL.top_k if rule.top_k is None else rule.top_k)
    slots = slots if rule.guaranteed is None else float(rule.guaranteed)
    slots = slots if rule.budget is None else rule.budget / 8
    slots *= 1.0 if rule.threshold is None else 1.0 - 0.9 * rule.threshold
    slots *= 1.0 if rule.top_p is None else rule.top_p
    return slots * (1 + 0.01 * layer)


def sensitivity(candidate: Candidate) -> Sensitivity:
    slots = cost(candidate.layer, candidate.rule)
    divergence = 0.001 * (candidate.layer + 1) * (MODEL.top_k - min(slots, 8.0)) ** 2
    return Sensitivity(candidate, divergence, 0.5 * divergence, slots, 4 * slots)


def setting(budget: float, decode_batch: int = 1) -> Setting:
    tried = [sensitivity(c) for c in candidates(MODEL, (1, decode_batch))]
    moved = {(n, k): (8 - k) * (6 - n) / 10 for n in range(6) for k in range(1, 9)}
    return Setting(MODEL, decode_batch, Budget("slots", budget), cost, tried, moved)


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
    counts = [rule.top_k for rule in STRATEGIES["bhep"].rules(setting(6.0))]
    assert counts == sorted(counts), "(6, 8, 8, 61): fewest in the first layer"
    lexi = [rule.top_k for rule in STRATEGIES["lexi"].rules(setting(6.0))]
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
        strategy("treshold")


def test_rates_put_divergence_in_nats_of_loss() -> None:
    found = setting(6.0).sensitivities
    rates = loss_rates(found)
    assert rates["decode", 2] == pytest.approx(0.5)
    free = [Sensitivity(Candidate("decode", 0, Rule(top_k=4)), 0.1, -0.2, 4, 4)]
    assert loss_rates(free)["decode", 0] == LEAST_RATE


def workload() -> Workload:
    line = LayerTime(1e-5, 1e-6, 1e-7, 0.0, 0.0)
    return Workload(8, 256, 8, 512, {"prompt": line, "decode": line})


def full() -> dict:
    return {(phase, n): (8.0, 30.0) for phase in ("prompt", "decode") for n in range(6)}


def test_a_front_is_safest_first_and_ever_faster() -> None:
    points = front(setting(6.0, 8).sensitivities, full(), workload(), [0.0, 0.01, 0.05, 0.2])
    assert len(points) >= 3
    for one, other in itertools.pairwise(points):
        assert other.predicted_loss > one.predicted_loss
        assert other.modelled_time < one.modelled_time
    assert points[0].predicted_loss == 0.0


def test_fixed_prompt_rules_stay_and_stand_alone_first() -> None:
    found = setting(6.0, 8).sensitivities
    prompt = (Rule(top_k=4),) * 6
    points = front(found, full(), workload(), [0.5, 0.9], prompt)
    assert all(point.prompt == prompt for point in points)
    assert all(rule.is_empty for rule in points[0].decode)
    without = front(found, full(), workload(), [0.5], ())
    assert all(point.prompt == () for point in without)
