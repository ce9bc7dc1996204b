"""One prediction, or one sweep, from settings to typed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import published_shape
from leanmoe.plan import Rule
from leanmoe.predict.run import find_plan, predict
from leanmoe.predict.settings import PredictSettings
from leanmoe.results.predict import SweepResults

NAME = "Qwen/Qwen3-30B-A3B"


def test_a_prediction_for_each_concurrency() -> None:
    settings = PredictSettings(NAME, top_k=4, concurrency=(1, 8), input_len="64", output_len="8")
    results = predict(settings)
    assert results.sweep is None
    assert [each.concurrency for each in results.predictions] == [1, 8]
    assert all(each.gain is not None and each.gain > 1 for each in results.predictions)


def test_a_sweep_is_typed_results_that_are_read_again() -> None:
    results = predict(PredictSettings(NAME, sweep=True, gpus=(2,), concurrency=(1, 8)))
    assert results.predictions == ()
    assert results.sweep is not None
    assert SweepResults.from_json(results.to_json()) == results.sweep
    assert [each.plan for each in results.sweep.cheapest] == ["full model"]


def test_no_plan_a_uniform_one_or_a_saved_one(tmp_path: Path) -> None:
    model = published_shape(NAME)
    assert find_plan(PredictSettings(NAME), model) is None
    plan = find_plan(PredictSettings(NAME, guaranteed=2), model)
    assert plan is not None
    assert set(plan.bands[0].rules) == {Rule(guaranteed=2)}
    plan.save(tmp_path / "plan.json")
    assert find_plan(PredictSettings(NAME, plan=tmp_path / "plan.json"), model) == plan
    with pytest.raises(LeanMoeError, match="not both"):
        find_plan(PredictSettings(NAME, plan=tmp_path / "plan.json", top_k=4), model)
