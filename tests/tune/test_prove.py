"""From points of a front to what is claimed: the order of proofs, one plan, one verdict a load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.core.intervals import Margin, RatioOfRuns
from leanmoe.plan import Rule
from leanmoe.results.tune import LoadGain
from leanmoe.stats.paired import Estimate, Verdict
from leanmoe.tune import prove
from leanmoe.tune.allocate import FrontPoint
from leanmoe.tune.context import TuneContext
from leanmoe.tune.prove import (
    Proof,
    Proved,
    assemble,
    last_accepted,
    verdict_on,
    verdict_without_gain,
)
from tests.tune.example import context


def proved(
    shared: TuneContext, decode: int, accepted: bool = True, prompt: int | None = None
) -> Proved:
    """A point with the same top-k in every layer, and what its validation said."""
    loss = Estimate(0.001, 0.0, 0.002, 0.002, 40, sources=40)
    layers = len(shared.no_rules)
    rules = () if prompt is None else (Rule(top_k=prompt),) * layers
    point = FrontPoint(rules, (Rule(top_k=decode),) * layers, 0.001, 0.8)
    return Proved(point, Verdict(accepted, loss, loss, Margin(0.005), "as tested"))


def gain(concurrency: int, low: float) -> LoadGain:
    ratio = RatioOfRuns(low + 0.1, low, low + 0.2, 5)
    return LoadGain(concurrency, 256, 32, 24, {}, "measured", ratio)


def test_the_last_point_within_the_margin_is_the_fastest(tmp_path: Path) -> None:
    shared = context(tmp_path)
    points = [proved(shared, 6), proved(shared, 5), proved(shared, 4, accepted=False)]
    assert last_accepted(points) is points[1]
    assert last_accepted(points[2:]) is None


def test_a_verdict_says_what_other_work_took(tmp_path: Path) -> None:
    shared = context(tmp_path)
    noted = replace(gain(8, 1.02), notes=("Other work took 1.0 of 2 cores",))
    verdict = verdict_on(shared, {8: [proved(shared, 5)]}, noted)
    assert verdict.accepted
    assert verdict.reason.endswith("is within the margin. Other work took 1.0 of 2 cores")


def test_a_load_without_a_point_gets_an_empty_band(tmp_path: Path) -> None:
    shared = context(tmp_path)
    plan = assemble(shared, {1: None, 8: proved(shared, 5, prompt=3)}, None)
    assert [band.up_to for band in plan.bands] == [2, 16]
    assert [band.is_empty for band in plan.bands] == [True, False]
    assert {rule.top_k for rule in plan.prompt} == {3}
    assert assemble(shared, {1: None, 8: None}, None).prompt == ()


@pytest.mark.parametrize(
    ("low", "accepted", "reason"),
    [
        (1.01, True, "the fastest plan tried is within the margin"),
        (0.99, False, "throughput is not surely higher (0.990 to 1.190 times)"),
    ],
)
def test_a_gain_counts_where_its_interval_is_above_one(
    tmp_path: Path, low: float, accepted: bool, reason: str
) -> None:
    shared = context(tmp_path)
    verdict = verdict_on(shared, {8: [proved(shared, 5)]}, gain(8, low))
    assert verdict.accepted is accepted
    assert verdict.reason.startswith(reason)
    assert verdict.up_to == 16


def test_a_plan_is_accepted_by_its_loss_where_its_gain_cannot_be_measured(tmp_path: Path) -> None:
    shared = context(tmp_path)
    verdict = verdict_without_gain(shared, {8: [proved(shared, 5)]}, 8, "no cache for it")
    assert verdict.accepted
    assert verdict.gain is None
    assert verdict.reason.endswith("its gain was not measured: no cache for it")
    refused = verdict_without_gain(shared, {8: [proved(shared, 5, accepted=False)]}, 8, "no cache")
    assert not refused.accepted


def test_without_a_proven_plan_no_gain_is_claimed(tmp_path: Path) -> None:
    shared = context(tmp_path)
    verdict = verdict_on(shared, {8: [proved(shared, 5, accepted=False)]}, gain(8, 1.5))
    assert (verdict.accepted, verdict.gain) == (False, None)
    assert verdict.reason == "no plan is within the margin: as tested"


def test_the_largest_load_chooses_the_prompt_rules_of_all_from_those_that_hold_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = context(tmp_path)
    fixed: dict[int, tuple[Rule, ...] | None] = {}

    def points(*given: object) -> list[FrontPoint]:
        _, _, concurrency, _, prompt = given
        assert isinstance(concurrency, int)
        fixed[concurrency] = prompt  # type: ignore[assignment]
        return [proved(shared, 6, prompt=5).point, proved(shared, 5, prompt=3).point]

    def validate(_proof: Proof, tried: Sequence[FrontPoint], _batch: int) -> list[Proved]:
        alone = all(rule.is_empty for rule in tried[0].decode)
        holds = not alone or tried[0].prompt[0].top_k == 5
        verdict = proved(shared, 5, accepted=holds).verdict
        return [Proved(point, verdict) for point in tried]

    monkeypatch.setattr(prove, "_points", points)
    monkeypatch.setattr(Proof, "validate", validate)
    outcome = prove.prove_all(Proof(shared, None, None), (), {1: {}, 8: {}})  # type: ignore[arg-type]
    assert fixed[8] is None
    assert fixed[1] is not None
    assert {rule.top_k for rule in fixed[1]} == {5}
    assert len(outcome[8]) == 1, "the point whose prompt rules do not hold alone is gone"
