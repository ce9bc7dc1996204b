"""Gain per finished request: what refuses a plan, and what is said where replies have no end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from leanmoe.bench import in_process
from leanmoe.core.intervals import LossChange, PairedRatio, RatioOfRuns, ReplyLengths
from leanmoe.plan import Plan, Rule
from leanmoe.results.tune import KindLoss, LoadVerdict
from leanmoe.runtime import shape_of
from leanmoe.scoring.windows import Windows
from leanmoe.stats.reply_lengths import compare_lengths
from leanmoe.tune import run
from leanmoe.tune.allocate import FrontPoint
from leanmoe.tune.context import TuneContext, TuneWindows
from leanmoe.tune.prove import Proved, Proven
from leanmoe.tune.run import _per_request, _replies, not_measurable
from tests.runtime.families import build
from tests.tune.example import context

FULL: list[int | None] = [10 + n for n in range(30)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> TuneContext:
    return context(tmp_path_factory.mktemp("replies"))


def verdict(accepted: bool = True) -> LoadVerdict:
    loss = LossChange(0.004, 0.003, 0.005, 0.005, 40)
    return LoadVerdict(8, 16, accepted, loss, RatioOfRuns(1.2, 1.15, 1.25, 8), "it is fast")


def proven(shared: TuneContext) -> Proven:
    """A plan with prompt rules, which were proven alone, too."""
    loss = LossChange(0.001, 0.0, 0.002, 0.002, 40)
    kind = KindLoss("prose", loss, loss, 0.01, 0.02, 0.03, 1, True, "as tested")
    alone = Proved(FrontPoint((), shared.no_rules, 0.001, 1.0), (kind,))
    return Proven({8: (alone,)}, {8: alone}, alone)


def judged(shared: TuneContext, growth: float, monkeypatch: pytest.MonkeyPatch) -> LoadVerdict:
    plan = [round(growth * (length or 0)) for length in FULL]
    found = compare_lengths(FULL, [plan], 500)
    monkeypatch.setattr(run, "_replies", lambda *_: found)
    return _per_request(shared, proven(shared), Plan(shared.fingerprint), verdict())


def test_replies_as_long_leave_the_verdict(
    shared: TuneContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged(shared, 1.0, monkeypatch)
    assert found.accepted
    assert found.per_request is not None
    assert found.per_request.ratio == pytest.approx(1.2)
    assert "per finished request +20.0% (+15.0% to +25.0%), replies 1.00 times" in found.reason


def test_replies_that_grow_by_more_than_the_gain_refuse_the_plan(
    shared: TuneContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged(shared, 2.0, monkeypatch)
    assert not found.accepted
    assert found.per_request is not None
    assert found.per_request.high < 1
    assert found.reason.startswith("replies grow by more than it gains: per finished request -40")
    assert found.loss is not None
    assert found.loss.ratio == 0.001, "what is left are prompt rules"


def test_replies_that_may_grow_by_less_do_not(
    shared: TuneContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(shared, 1.19, monkeypatch).accepted


def test_too_few_that_end_are_said_in_place_of_a_number(
    shared: TuneContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ReplyLengths(32, 128, 3, None, 0, None)
    monkeypatch.setattr(run, "_replies", lambda *_: few)
    found = _per_request(shared, proven(shared), Plan(shared.fingerprint), verdict())
    assert found.accepted
    assert found.per_request is None
    assert found.replies == few
    assert (
        "Reply lengths not measurable on this model: 3 of 32 of the full model's replies ended "
        "within 128 tokens" in found.reason
    )
    both = replace(few, full_ended=25, plan_ended=15, both_ended=14)
    assert "14 of 32 of both models' replies" in not_measurable(both)


def test_nothing_is_measured_where_no_plan_is_accepted_or_none_is_asked_for(
    shared: TuneContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_replies", lambda *_: pytest.fail("measured"))
    plan = Plan(shared.fingerprint)
    refused = verdict(accepted=False)
    assert _per_request(shared, proven(shared), plan, refused) == refused
    none = replace(shared, settings=replace(shared.settings, reply_prompts=0))
    assert _per_request(none, proven(shared), plan, verdict()) == verdict()


def runnable(folder: Path, ends: set[int]) -> TuneContext:
    """A tiny model, text of 30 prompts, and a load of one request."""
    shared = context(folder, (1,))
    model = build("qwen3_moe")
    model.generation_config.eos_token_id = sorted(ends) or None
    ids_SN = torch.arange(30 * 8).reshape(30, 8) % (model.config.vocab_size - 1) + 1
    text = SimpleNamespace(proved={"prose": Windows.of_ids(ids_SN)})
    settings = replace(shared.settings, reply_prompts=24, reply_cap=6, input_len=5)
    return replace(
        shared, model=model, shape=shape_of(model), text=cast(TuneWindows, text), settings=settings
    )


def test_replies_are_written_to_their_end_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token ends a reply: all are one token long, whatever wrote them."""
    shared = runnable(tmp_path, set(range(build("qwen3_moe").config.vocab_size)))
    plan = Plan.uniform(shared.fingerprint, Rule(top_k=1))
    found = _replies(shared, plan, 1)
    assert found == ReplyLengths(24, 6, 24, 24, 24, PairedRatio(1.0, 1.0, 1.0))
    monkeypatch.setattr(in_process, "write_on", lambda *_, **__: pytest.fail("written again"))
    assert _replies(shared, plan, 1) == found


def test_the_plan_writes_nothing_where_the_full_models_replies_have_no_end(
    tmp_path: Path,
) -> None:
    shared = runnable(tmp_path, set())
    plan = Plan.uniform(shared.fingerprint, Rule(top_k=1))
    assert _replies(shared, plan, 1) == ReplyLengths(24, 6, 0, None, 0, None)
