"""What the plots show, read back from the figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leanmoe.core.intervals import Margin
from leanmoe.plan import Plan, Rule
from leanmoe.report import plots
from tests.report import example


@pytest.mark.parametrize("times", [[0.531], [0.531, 0.534, 0.552]])
def test_ticks_of_times_that_lie_close_differ(times: list[float]) -> None:
    front = example.tune_results().fronts[1]
    points = tuple(replace(front.points[0], modelled_time=time) for time in times)
    axis = plots.loss_front(replace(front, points=points), Margin(0.005)).layout.xaxis
    assert axis.tickformat == "~%"
    assert 0.5 < axis.range[0] < min(times) <= max(times) < axis.range[1] < 0.6


def test_the_chosen_plan_is_a_trace_of_its_own() -> None:
    figure = plots.loss_front(example.tune_results().fronts[1], Margin(0.005))
    assert [trace.name for trace in figure.data] == ["validated", "chosen plan"]
    assert len(figure.data[1].x) == 1


def test_the_best_strategy_stands_at_the_top() -> None:
    (bar,) = plots.strategies(example.tune_results().strategies).data
    assert list(bar.x) == sorted(bar.x, reverse=True)


def test_the_heat_map_has_a_column_for_each_band_and_for_prompts() -> None:
    plan = Plan.from_json(example.plan())
    plan = plan.with_level(prompt=(Rule(top_k=0),) * plan.model.moe_layers)
    (heat,) = plots.plan_heat_map(plan, {1: [6.0] * 6}).data
    assert list(heat.x) == ["prompt tokens", "1 to 2", "3 to 16", "17+"]
    assert list(heat.z[0]) == [0.0, 8.0, 6.0, 8.0]
    assert list(heat.text[0]) == ["top_k 0", "full", "top_k 6", "top_k 7, threshold 0.2"]


def test_use_is_shown_most_used_first() -> None:
    (heat,) = plots.expert_use(example.tune_results().profile).data
    assert list(heat.z[0]) == sorted(heat.z[0], reverse=True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "full"),
        ({"top_k": 6, "guaranteed": 3}, "top_k 6, guaranteed 3"),
        ({"experts": [1, 2]}, "2 experts"),
        ({"top_k": 6, "keep_weights": True}, "top_k 6, weights kept"),
        ({"top_k": 6, "renormalise": 0.5}, "top_k 6, weights renormalised by 0.5"),
    ],
)
def test_rules_in_words(rule: dict[str, object], words: str) -> None:
    assert plots.describe_rule(Rule.from_json(rule)) == words
