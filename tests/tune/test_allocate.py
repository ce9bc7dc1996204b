"""The knapsack against every combination, tried one by one; the front is safest first."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.results.tune import Phase
from leanmoe.tune.allocate import Offer, Workload, cheapest, front, pareto
from leanmoe.tune.layers import LayerTime
from tests.tune.example import setting

NUMBERS = st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 2))
ITEMS = st.lists(
    st.lists(st.builds(Offer, NUMBERS, NUMBERS), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def totals(items: list[list[Offer]]) -> list[tuple[float, float]]:
    return [
        (sum(option.loss for option in chosen), sum(option.time for option in chosen))
        for chosen in itertools.product(*items)
    ]


@given(ITEMS, NUMBERS)
def test_cheapest_is_the_best_of_all_combinations(items: list[list[Offer]], budget: float) -> None:
    within = [time for loss, time in totals(items) if loss <= budget * (1 + 1e-9)]
    if not within:
        with pytest.raises(LeanMoeError, match="no plan loses at most"):
            cheapest(items, budget)
        return
    chosen = [item[n] for item, n in zip(items, cheapest(items, budget), strict=True)]
    assert sum(option.loss for option in chosen) <= budget * (1 + 1e-9)
    assert sum(option.time for option in chosen) == pytest.approx(min(within), abs=1e-9)


@given(ITEMS)
def test_no_combination_is_better_than_the_front(items: list[list[Offer]]) -> None:
    found = pareto(items)
    for loss, time in totals(items):
        assert any(a.loss <= loss + 1e-9 and a.time <= time + 1e-9 for a in found)
    assert all(a.loss < b.loss and a.time > b.time for a, b in itertools.pairwise(found))


@given(ITEMS)
def test_a_thinned_front_keeps_its_ends(items: list[list[Offer]]) -> None:
    """What is dropped costs at most the stated share of the range of losses."""
    whole, thinned = pareto(items), pareto(items, points=8)
    assert thinned[-1].time == pytest.approx(whole[-1].time)
    for allocation in thinned:
        chosen = [item[n] for item, n in zip(items, allocation.chosen, strict=True)]
        assert sum(option.loss for option in chosen) == pytest.approx(allocation.loss)
        assert sum(option.time for option in chosen) == pytest.approx(allocation.time)


def test_what_one_layer_seems_to_win_pays_for_nothing() -> None:
    items = [
        [Offer(0.0, 5.0), Offer(-3.0, 4.0)],
        [Offer(0.0, 5.0), Offer(2.0, 1.0)],
    ]
    assert cheapest(items, 1.0) == (1, 0)


@pytest.mark.parametrize("option", [Offer(float("nan"), 1.0), Offer(1.0, float("inf"))])
def test_numbers_that_are_none_are_refused(option: Offer) -> None:
    with pytest.raises(LeanMoeError, match="not a finite number"):
        cheapest([[option]], 1.0)
    with pytest.raises(LeanMoeError, match="no option"):
        cheapest([[]], 1.0)
    with pytest.raises(LeanMoeError, match="must not be negative"):
        cheapest([[Offer(0, 1)]], -1.0)


def workload() -> Workload:
    line = LayerTime(1e-5, 1e-6, 1e-7, 0.0, 0.0)
    return Workload(8, 256, 8, 512, {"prompt": line, "decode": line})


def full() -> dict[tuple[Phase, int], tuple[float, float]]:
    phases: tuple[Phase, ...] = ("prompt", "decode")
    return {(phase, n): (8.0, 30.0) for phase in phases for n in range(6)}


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
