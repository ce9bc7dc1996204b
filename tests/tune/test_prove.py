"""From points of a front to what is claimed: the order of proofs, one plan, one verdict a load."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from leanmoe.core.intervals import LossChange, Margin, RatioOfRuns
from leanmoe.core.provenance import Provenance
from leanmoe.plan import Rule
from leanmoe.results.tune import KindLoss, KindOfText, LoadGain, TextPart
from leanmoe.stats.losses import Divergence, Losses
from leanmoe.tune import prove
from leanmoe.tune.allocate import FrontPoint
from leanmoe.tune.context import TuneContext, TuneWindows
from leanmoe.tune.prove import (
    Aim,
    Proof,
    Proved,
    Proven,
    aims,
    assemble,
    kind_loss,
    level_proof,
    prove_margins,
    verdict_on,
    verdict_without_gain,
)
from leanmoe.tune.settings import TuneSettings
from tests.tune.example import context

MARGIN = Margin(0.005)


def proved(
    shared: TuneContext, decode: int | None, accepted: bool = True, prompt: int | None = None
) -> Proved:
    """A point with the same top-k in every layer, and what its validation said of two kinds."""
    layers = len(shared.no_rules)
    rules = () if prompt is None else (Rule(top_k=prompt),) * layers
    point = FrontPoint(rules, (Rule(top_k=decode),) * layers, 0.001, (decode or 9) / 10)
    return Proved(point, (kind("prose", 0.001), kind("code", 0.002, accepted)))


def kind(name: str, ratio: float, accepted: bool = True) -> KindLoss:
    loss = LossChange(ratio, 0.0, ratio + 0.001, ratio + 0.001, 40, sources=40)
    return KindLoss(name, loss, loss, 0.01, 0.02, 0.03, 1, accepted, "as tested")


def proven(load: int, *points: Proved) -> Proven:
    """The last accepted of the points is chosen."""
    accepted = [each for each in points if each.accepted]
    return Proven({load: points}, {load: accepted[-1] if accepted else None}, None)


def gain(concurrency: int, low: float) -> LoadGain:
    ratio = RatioOfRuns(low + 0.1, low, low + 0.2, 5)
    return LoadGain(concurrency, 256, 32, 24, {}, "measured", ratio)


def test_a_plan_is_as_good_as_the_kind_it_loses_most_on(tmp_path: Path) -> None:
    shared = context(tmp_path)
    point = proved(shared, 6)
    assert (point.accepted, point.worst.kind) == (True, "code")
    worse = Proved(point.point, (kind("prose", 0.001, accepted=False), kind("code", 0.002)))
    assert (worse.accepted, worse.worst.kind, worse.reason) == (False, "prose", "prose: as tested")


def test_a_verdict_says_what_other_work_took(tmp_path: Path) -> None:
    shared = context(tmp_path)
    noted = replace(gain(8, 1.02), notes=("Other work took 1.0 of 2 cores",))
    verdict = verdict_on(shared, proven(8, proved(shared, 5)), noted)
    assert verdict.accepted
    assert verdict.reason.endswith("on every kind of text. Other work took 1.0 of 2 cores")


def test_a_load_without_a_point_gets_an_empty_band(tmp_path: Path) -> None:
    shared = context(tmp_path)
    plan = assemble(shared, MARGIN, {1: None, 8: proved(shared, 5, prompt=3)}, None)
    assert [band.up_to for band in plan.bands] == [2, 16]
    assert [band.is_empty for band in plan.bands] == [True, False]
    assert {rule.top_k for rule in plan.prompt} == {3}
    assert assemble(shared, MARGIN, {1: None, 8: None}, None).prompt == ()


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
    verdict = verdict_on(shared, proven(8, proved(shared, 5)), gain(8, low))
    assert verdict.accepted is accepted
    assert verdict.reason.startswith(reason)
    assert verdict.up_to == 16


def test_a_plan_is_accepted_by_its_loss_where_its_gain_cannot_be_measured(tmp_path: Path) -> None:
    shared = context(tmp_path)
    verdict = verdict_without_gain(shared, proven(8, proved(shared, 5)), 8, "no cache for it")
    assert verdict.accepted
    assert verdict.gain is None
    assert verdict.reason.endswith("its gain was not measured: no cache for it")
    refused = verdict_without_gain(
        shared, proven(8, proved(shared, 5, accepted=False)), 8, "no cache"
    )
    assert not refused.accepted


def test_without_a_proven_plan_no_gain_is_claimed(tmp_path: Path) -> None:
    shared = context(tmp_path)
    verdict = verdict_on(shared, proven(8, proved(shared, 5, accepted=False)), gain(8, 1.5))
    assert (verdict.accepted, verdict.gain) == (False, None)
    assert verdict.reason == "no plan is within the margin: code: as tested"


def test_a_load_without_a_gain_shows_what_its_prompt_rules_cost(tmp_path: Path) -> None:
    shared = context(tmp_path)
    alone = Proved(proved(shared, None, prompt=3).point, (kind("prose", 0.0005),))
    of_all = replace(proven(8, proved(shared, 5, prompt=3)), alone=alone)
    verdict = verdict_on(shared, of_all, gain(8, 0.9))
    assert verdict.loss is not None
    assert (verdict.accepted, verdict.loss.ratio) == (False, 0.0005)
    assert verdict_on(shared, of_all, gain(8, 1.1)).loss == kind("code", 0.002).loss


def aim(shared: TuneContext, prompt: int, decode: int, loss: float = 0.001) -> Aim:
    points = {load: proved(shared, decode, prompt=prompt).point for load in (1, 8)}
    alone = {load: replace(each, decode=shared.no_rules) for load, each in points.items()}
    return Aim(loss, alone, points)


def proven_unless(
    monkeypatch: pytest.MonkeyPatch, shared: TuneContext, refused: Callable[[int, FrontPoint], bool]
) -> tuple[Proven, list[tuple[int, int, int | None]]]:
    """What is proven of two levels, and each test in order: load, top-k of prompts and decode."""
    order: list[tuple[int, int, int | None]] = []

    def validate(_proof: Proof, load: int, point: FrontPoint) -> Proved:
        order.append((load, point.prompt[0].top_k or 0, point.decode[0].top_k))
        return Proved(point, (kind("prose", 0.001, not refused(load, point)),))

    monkeypatch.setattr(Proof, "validate", validate)
    ordered = [aim(shared, 5, 6), aim(shared, 3, 5)]
    return prove.prove_all(Proof(shared, MARGIN, None), ordered), order


def decode_rules(outcome: Proven) -> dict[int, int | None]:
    chosen = {load: p for load, p in outcome.chosen.items() if p is not None}
    return {load: each.point.decode[0].top_k for load, each in chosen.items()}


def test_all_loads_are_in_one_sequence_that_ends_at_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = context(tmp_path)
    outcome, order = proven_unless(
        monkeypatch, shared, lambda _load, point: point.prompt[0].top_k == 3
    )
    assert order == [(1, 5, None), (1, 5, 6), (8, 5, 6), (1, 3, None)]
    assert decode_rules(outcome) == {1: 6, 8: 6}
    assert outcome.alone is not None
    assert {rule.top_k for rule in outcome.alone.point.prompt} == {5}


def test_a_load_whose_plan_fails_runs_the_prompt_rules_alone_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = context(tmp_path)

    def refused(load: int, point: FrontPoint) -> bool:
        return load == 8 and point.decode[0].top_k == 5

    outcome, order = proven_unless(monkeypatch, shared, refused)
    assert order[-1] == (8, 3, 5)
    # Aim 1: 0.6 at both loads; aim 2: 0.5 at load 1, and prompt rules alone, 0.5 as well, at 8.
    assert decode_rules(outcome) == {1: 5, 8: None}
    assert {p.point.prompt[0].top_k for p in outcome.chosen.values() if p} == {3}


def test_nothing_is_chosen_where_the_safest_prompt_rules_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, order = proven_unless(monkeypatch, context(tmp_path), lambda *_: True)
    assert len(order) == 1
    assert (outcome.chosen, outcome.alone) == ({1: None, 8: None}, None)


def test_each_margin_has_a_sequence_of_its_own_along_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger margin goes on where the smaller one's testing ended."""
    shared = context(tmp_path)
    margins = (Margin(0.002), Margin(0.01))
    shared = replace(shared, settings=replace(shared.settings, margins=margins))
    order: list[tuple[str, int | None]] = []

    def validate(proof: Proof, _load: int, point: FrontPoint) -> Proved:
        slots = point.decode[0].top_k
        order.append((proof.margin.name, slots))
        loss = {None: 0.0, 6: 0.001, 5: 0.004, 4: 0.02, 3: 0.03}[slots]
        return Proved(point, (kind("prose", loss, loss <= proof.margin.value),))

    monkeypatch.setattr(Proof, "validate", validate)
    aimed = ((6, 0.001), (5, 0.005), (4, 0.02), (3, 1.0))
    ordered = [aim(shared, 5, slots, loss) for slots, loss in aimed]
    slow = {load: replace(each, modelled_time=1.0) for load, each in ordered[0].alone.items()}
    ordered = [replace(each, alone=slow) for each in ordered]
    found = prove_margins(shared, None, ordered, loss=2.0)
    assert {m.name: decode_rules(each) for m, each in found.items()} == {
        "0.2%": {1: 6, 8: 6},
        "1%": {1: 5, 8: 5},
    }
    assert [k for name, k in order if name == "0.2%"] == [None, 6, 6, None, 5]
    assert [k for name, k in order if name == "1%"] == [None, 6, 6, None, 5, 5, None, 4]


def test_a_proof_holds_each_kind_at_the_load_that_it_loses_most_at(tmp_path: Path) -> None:
    shared = context(tmp_path)
    parts = [KindOfText(n, f"{n}.txt", TextPart(9, 99), 0.0, 0.1) for n in ("prose", "code")]
    shared = replace(
        shared,
        text=cast(TuneWindows, SimpleNamespace(kinds=tuple(parts))),
        model=SimpleNamespace(dtype="torch.float32"),
    )
    worse = Proved(proved(shared, 5).point, (kind("prose", 0.003), kind("code", 0.001)))
    points = {1: proved(shared, 6), 8: worse, 32: None}
    of_all = Proven(dict.fromkeys(points, ()), points, None)
    shared = replace(shared, settings=replace(shared.settings, concurrency=(1, 8, 32)))
    verdicts = [verdict_without_gain(shared, of_all, load, "no cache") for load in points]
    made = Provenance("", "a processor", 2, {"torch": "2"}, "abc", 0, "")
    with pytest.MonkeyPatch.context() as patch:
        applied = SimpleNamespace(implementation="leanmoe experts_cpu")
        patch.setattr(TuneContext, "full", lambda _: nullcontext(applied))
        proof = level_proof(shared, MARGIN, verdicts, made)
    assert [(each.kind, each.loss) for each in proof.kinds] == [("prose", 0.003), ("code", 0.002)]
    assert (proof.concurrency, proof.bound, proof.dtype) == ((1, 8), 0.004, "float32")
    assert (proof.implementation, proof.kinds[0].source) == ("leanmoe experts_cpu", "prose.txt")


def test_the_order_of_tests_is_fixed_on_calibration_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aims are made with nothing of the held-out text at hand, and share their prompt rules."""
    shared = context(tmp_path)
    budgets: list[float] = []

    def points(*given: Any) -> list[FrontPoint]:
        _, _, load, _, (budget,), prompt = given
        budgets.append(budget)
        own = proved(shared, 8 - load // 4, prompt=5).point
        return [own] if prompt is None else [replace(own, decode=shared.no_rules), own]

    def refined(*given: Any) -> tuple[Rule, ...]:
        _, _, decode, load = given
        return tuple(replace(rule, renormalise=1 / load) for rule in decode)

    monkeypatch.setattr(prove, "points_for", points)
    monkeypatch.setattr(prove, "refined", refined)
    made = aims(shared, None, (), {1: {}, 8: {}}, 2.0)
    assert len(made) == 1, "aims that are the same stand once"
    assert made[0].own[1].prompt == made[0].own[8].prompt
    assert max(budgets) == pytest.approx(1.5 * 0.005 * 2.0)
    assert {rule.renormalise for rule in made[0].own[8].decode} == {1 / 8}
    assert all(rule.is_empty for rule in made[0].alone[8].decode)


def test_the_losses_of_several_draws_make_one_verdict() -> None:
    names = tuple(f"d{n}" for n in range(40))
    tokens_U = np.full(40, 100)
    full = Losses(names, np.full(40, 300.0), tokens_U)
    drawn = [
        Divergence(np.full(40, 1.0), np.full(40, 2.0), replace(full, loss_U=full.loss_U + n), full)
        for n in (0.5, 1.0, 1.5)
    ]
    found = kind_loss(TuneSettings("reference"), MARGIN, "prose", drawn)
    assert found.loss.ratio == pytest.approx(1 / 300)
    assert (found.divergence, found.flips, found.batch_draws) == (0.01, 0.02, 3)
    assert found.worst_tenth == pytest.approx(1 / 300)
    assert found.perplexity > found.nats.ratio
    assert found.nats.ratio == pytest.approx(0.01)
    alone = kind_loss(TuneSettings("reference"), MARGIN, "p", drawn[1:2])
    assert found.loss.upper_bound > alone.loss.ratio
